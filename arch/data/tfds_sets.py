"""Text data sets of TensorFlow Datasets, read and prepared without TensorFlow."""

import contextlib
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.download import downloader

from ..closest import closest
from .documents import Piece, Source, choose_fields, one_line, record_key, record_pieces
from .files import content_hash
from .python_stdlib import PythonStdlib

# TFDS imports its older builders only when these are asked for.
_BUILDER_MODULES = ("question_answering", "summarization", "text", "text_simplification")


class TfdsSource(Source):
  """A split of a TFDS data set.

  Args:
    name: of the set, for messages.
    builder: the set, prepared.
    split: such as "train" or "train[:1%]".
    text_field, prompt_field: the features with the text and the prompt, see `choose_fields`.
  """

  has_records = True

  def __init__(
    self,
    name: str,
    builder: tfds.core.DatasetBuilder,
    split: str,
    text_field: str | None = None,
    prompt_field: str | None = None,
  ):
    self.name = name
    self._what = f"TFDS set {builder.info.full_name}, split {split}"
    texts = [
      feature
      for feature, kind in builder.info.features.items()
      if isinstance(kind, tfds.features.Tensor)
      and kind.shape == ()
      and np.dtype(kind.np_dtype) == np.dtype(object)
    ]
    self._fields = choose_fields(texts, text_field, prompt_field, f"TFDS set {name}")
    self.has_prompts = self._fields[1] is not None
    with explained(f"cannot read the {self._what}"):
      info = builder.info.splits[split]
      self._records = builder.as_data_source(split)
      files = [Path(file).stat() for file in info.filepaths]
    whole = re.match(r"\w*", split)[0]
    total = builder.info.splits.get(whole, info)
    self.size = int(total.num_bytes or 0) * len(self._records) // max(total.num_examples, 1)
    identity = builder.info.full_name, split, self._fields, len(self._records)
    stamps = [(file.st_size, file.st_mtime_ns) for file in files]
    self.key = f"tfds-{builder.info.name}-{content_hash([repr((identity, stamps))])}"

  def keys(self) -> Iterator[str]:
    return (record_key(*record) for record in self._texts(range(len(self._records))))

  def pieces(self, *, cut: bool = False) -> Iterator[Piece]:
    del cut  # a record is never cut
    for record in self._texts(range(len(self._records))):
      yield from record_pieces(*record)

  def sample(self, share: float, *, cut: bool = False) -> Iterator[Piece]:
    del cut
    count = len(self._records)
    # Evenly spaced, so that only these are read.
    for record in self._texts(np.linspace(0, count, int(share * count), False, dtype=int)):
      yield from record_pieces(*record)

  def _texts(self, indices: Iterable[int]) -> Iterator[tuple[str, str]]:
    """Prompt and text of the records that are not empty."""
    text_field, prompt_field = self._fields
    for index in indices:
      with explained(f"cannot read record {index} of the {self._what}"):
        record = self._records[index]
        text = record[text_field].decode("utf-8")
        prompt = record[prompt_field].decode("utf-8") if prompt_field else ""
      if text:
        yield prompt, text


def prepared_builder(name: str, folder: Path) -> tfds.core.DatasetBuilder:
  """A TFDS data set by name, `lm1b`, `c4/en` or `wiki40b/en:1.3.0`, downloaded if need be.

  It is looked for in `folder` and in TFDS's own folder (the environment's `TFDS_DATA_DIR`, or
  `~/tensorflow_datasets`), and otherwise prepared in `folder`. A set that is unknown, cannot be
  downloaded, or needs TensorFlow to be prepared or read is a ValueError.
  """
  tfds.disable_progress_bar()
  for data_dir in (folder, None):
    with (
      _quiet(),
      contextlib.suppress(tfds.core.registered.DatasetNotFoundError),
      explained(f"cannot use the TFDS set {name!r}", tfds.core.registered.DatasetNotFoundError),
    ):
      found = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
      return _readable(found)
  _check_known(name, folder)

  def make_builder() -> tfds.core.DatasetBuilder:
    return tfds.builder(name, data_dir=folder, file_format="array_record")

  with _quiet(), explained(f"cannot use the TFDS set {name!r}"):
    module = sys.modules[type(make_builder()).__module__]
    if hasattr(module, "tf") and importlib.util.find_spec("tensorflow") is None:
      # TFDS would find out after the download.
      raise ModuleNotFoundError(name="tensorflow")
  print(f"preparing the TFDS set {name} in {folder}", file=sys.stderr, flush=True)
  # Without a network, ten tries would take TFDS three minutes and a half.
  downloader.MAX_RETRIES = min(downloader.MAX_RETRIES, 5)
  # The copies that Google keeps are of a format that only TensorFlow reads.
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  with explained(f"cannot download and prepare the TFDS set {name!r}"):
    return prepared(make_builder, download_config=config)


def stdlib_builder(folder: Path) -> tfds.core.DatasetBuilder:
  """The default corpus, prepared in `folder`."""
  tfds.disable_progress_bar()
  return prepared(lambda: PythonStdlib(data_dir=folder))


def prepared(
  make_builder: Callable[[], tfds.core.DatasetBuilder], **options
) -> tfds.core.DatasetBuilder:
  with _quiet():
    builder = make_builder()
    try:
      builder.download_and_prepare(**options)
    except OSError:
      # Of two processes that build at once, the second cannot rename its result into place.
      builder = make_builder()
      if not builder.is_prepared():
        raise
    return builder


def _readable(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
  formats = {file_format.value for file_format in builder.info.available_file_formats()}
  if "array_record" not in formats:
    raise ValueError(
      f"it lies in {builder.data_path} as {', '.join(sorted(formats))}, which needs TensorFlow to "
      "read: prepare it again with --file_format=array_record"
    )
  return builder


def _check_known(name: str, folder: Path) -> None:
  with explained(f"cannot use the TFDS set {name!r}"):
    base = naming.parse_builder_name_kwargs(name)[0].name
  for module in _BUILDER_MODULES:
    with contextlib.suppress(ImportError):
      importlib.import_module(f"tensorflow_datasets.{module}")
  known = set(tfds.list_builders(with_community_datasets=False))
  if base in known:
    return
  known.update(path.name for path in folder.glob("[!.]*") if path.is_dir())
  guess = closest(base, sorted(known))
  hint = f"; the closest is {guess!r}" if guess else ", and none with a name like it"
  raise ValueError(f"there is no TFDS set {base!r}{hint}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what TFDS and urllib3 print and warn of: where it matters, an error says it."""
  disabled = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.disable(disabled)


@contextlib.contextmanager
def explained(what: str, *passed: type[Exception]) -> Iterator[None]:
  """Turns whatever TFDS and what it uses raise into one line, but for `passed`."""
  try:
    yield
  except passed:
    raise
  except ImportError as error:
    # TFDS names no module where it is TensorFlow that it lacks.
    needed = error.name or ("tensorflow" if "tensorflow" in str(error).lower() else "a package")
    raise ValueError(
      f"{what}: TFDS needs {needed} to prepare it; install that, or prepare it elsewhere with "
      "`tfds build --file_format=array_record` and set TFDS_DATA_DIR"
    ) from error
  # A data set's builder is anybody's code, and runs here: there is no list of what it raises. The
  # error goes on, with its own text and as the cause.
  except Exception as error:
    network = any(
      word in type(error).__name__ for word in ("Connection", "Timeout", "Download", "URLError")
    )
    hint = " (is there no network?)" if network else ""
    raise ValueError(f"{what}{hint}: {one_line(error)}") from error
