"""The Python standard library's own source as a text corpus.

About 12 MB of clean, varied, well-commented text that lies on every machine which can run this
library, so a language model can be trained with no download at all. One document per `.py` file.
"""

import itertools
import sys
import sysconfig
from pathlib import Path

import tensorflow_datasets as tfds

from .documents import is_held_out
from .files import content_hash

# Test suites would be three fifths of the bytes; the packages folders hold what users installed.
_SKIPPED_FOLDERS = frozenset(
  {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)


def stdlib_root() -> Path:
  """The folder that holds the running Python's standard library."""
  return Path(sysconfig.get_paths()["stdlib"])


def _read_documents(root: Path) -> dict[str, str]:
  """Text of every source file under `root` by its relative path, in the order of the paths."""
  documents = {}
  for file in sorted(root.rglob("*.py")):
    path = file.relative_to(root)
    if _SKIPPED_FOLDERS.isdisjoint(path.parts) and file.is_file():
      try:
        # `read_text` would turn CR LF into LF.
        text = file.read_bytes().decode("utf-8")
      except UnicodeDecodeError:
        continue
      if text:
        documents[path.as_posix()] = text
  return documents


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """Source files of the running Python's standard library, without its tests.

  The name of the builder's config is derived from the content, as in `py3.11-1a2b3c4d`, so a
  dataset prepared by another Python is never mistaken for this one's. Records are stored as
  array_record, which `as_data_source` reads at random and without TensorFlow.
  """

  VERSION = tfds.core.Version("1.0.0")
  # TFDS would look these up through importlib.resources, which fails inside a namespace package
  # that is installed in editable mode.
  code_path = Path(__file__)
  pkg_dir_path = Path(__file__).parent

  def __init__(self, **kwargs):
    root = stdlib_root()
    self._documents = _read_documents(root)
    if not self._documents:
      raise ValueError(f"expected Python source files under {root}, found none")
    super().__init__(file_format="array_record", **kwargs)

  def get_default_builder_config(self) -> tfds.core.BuilderConfig:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    content = content_hash(itertools.chain.from_iterable(self._documents.items()))
    return tfds.core.BuilderConfig(name=f"py{version}-{content[:8]}")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {"path": tfds.features.Text(), "text": tfds.features.Text()}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      "train": self._generate_examples(validation=False),
      "validation": self._generate_examples(validation=True),
    }

  def _generate_examples(self, validation: bool):
    for path, text in self._documents.items():
      if is_held_out(path) == validation:
        yield path, {"path": path, "text": text}


def held_out_text() -> bytes:
  """The validation documents, one after another."""
  documents = _read_documents(stdlib_root())
  return "".join(text for path, text in documents.items() if is_held_out(path)).encode()
