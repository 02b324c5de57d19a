"""Clips of spoken words as a TFDS data set, prepared and read without TensorFlow."""

import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from .audio_files import BadAudioError, read_audio, soundfile_module
from .files import content_hash, prepared_folder
from .speech_files import NOISE, Files, find_clips, identity, opened
from .speech_lists import Clip
from .tfds_sets import prepared

NOISE_SPLIT = "noise"
NOTES = "files.txt"  # beside the records: a line for every file that is not simply used

_NOISE_LENGTHS = 10  # sequences that a recording of noise has at least: a tenth of it is a part
_MORE_THAN_A_BIT = 1.1
_TOLD = {"bad": "left out as", "unused": "not used,", "converted": "converted,"}


class SpeechClips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Spoken words, 16-bit samples at one rate.

  A clip that is longer than a sequence is cut to its middle; those that are shorter stay short.
  Recordings of noise are whole, in a split of their own. Splits without a record do not exist.
  Records lie in the order of their paths, and the data set's metadata tells of them without a look
  at them: `names` of the classes, sorted, the classes of every split by number, `classes`, the
  `lengths` of the recordings of noise, and how many files are `bad`, `converted` and `unused`, by
  kind. `notes` has a line for each of them.

  Args:
    files: to read.
    length: samples of a sequence.
    sample_rate: samples a second.
    config: the name of what is prepared, derived from its content.
    kwargs: of every TFDS builder.
  """

  VERSION = tfds.core.Version("1.1.0")
  # TFDS would look these up through importlib.resources, which fails inside a namespace package
  # that is installed in editable mode.
  code_path = Path(__file__)
  pkg_dir_path = Path(__file__).parent

  def __init__(self, files: Files, *, length: int, sample_rate: int, config: str, **kwargs: Any):
    self._files, self._length, self._sample_rate = files, length, sample_rate
    self.notes: list[str] = []
    super().__init__(
      config=tfds.core.BuilderConfig(name=config), file_format="array_record", **kwargs
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description=SpeechClips.__doc__,
      features=tfds.features.FeaturesDict(
        {
          # As bytes: TFDS would store every sample as an int64, of up to ten bytes.
          "audio": tfds.features.Tensor(
            shape=(None,), dtype=np.int16, encoding=tfds.features.Encoding.BYTES
          ),
          "label": tfds.features.Text(),
          "path": tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(
        names=[], classes={}, lengths=[], bad={}, converted={}, unused={}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    clips, noise, unused = find_clips(self._files)
    every = [clip.path for clip in itertools.chain(*clips.values())] + noise
    if any(path.lower().endswith(".flac") for path in every):
      soundfile_module()  # or every such file would be called bad
    metadata = self.info.metadata
    metadata["names"] = sorted({clip.label for clip in itertools.chain(*clips.values())})
    metadata["classes"] = {split: [] for split in clips}
    for reason, paths in unused.items():
      for path in paths:
        self._count("unused", reason, path)
    splits = {split: self._clips(split, found) for split, found in clips.items()}
    splits[NOISE_SPLIT] = self._noise(noise)
    filled = {}
    for split, records in splits.items():
      first = next(records, None)  # TFDS fails over a split that turns out empty
      if first is not None:
        filled[split] = itertools.chain([first], records)
    if not filled.keys() - {NOISE_SPLIT}:
      first, count = _first_bad(metadata)
      raise ValueError(
        f"{self._files.name} has no clip that can be used, {count} files cannot: {first}"
      )
    return filled

  def _generate_examples(self):
    raise NotImplementedError  # the splits differ

  def _clips(self, split: str, clips: list[Clip]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = {name: i for i, name in enumerate(self.info.metadata["names"])}
    for clip in clips:
      samples = self._read(clip.path)
      if samples is not None:
        if len(samples) > _MORE_THAN_A_BIT * self._length:
          self._count("converted", f"longer than {self._length / self._sample_rate:g} s", clip.path)
        self.info.metadata["classes"][split].append(number[clip.label])
        audio = middle(samples, self._length)
        yield clip.path, {"audio": audio, "label": clip.label, "path": clip.path}

  def _noise(self, paths: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    least = _NOISE_LENGTHS * self._length
    for path in paths:
      samples = self._read(path)
      if samples is None:
        continue
      if len(samples) < least:
        message = f"{path} has {len(samples)} samples, expected at least {least} of noise"
        self._count("bad", "too short", message)
        continue
      self.info.metadata["lengths"].append(len(samples))
      yield path, {"audio": samples, "label": NOISE, "path": path}

  def _read(self, path: str) -> np.ndarray | None:
    try:
      data = self._files.read(path)
      audio = read_audio(data, sample_rate=self._sample_rate, name=path)
    except BadAudioError as error:
      self._count("bad", error.kind, str(error))
      return None
    for kind in audio.converted:
      self._count("converted", kind, path)
    return audio.samples

  def _count(self, what: str, kind: str, file: str) -> None:
    self.info.metadata[what].setdefault(kind, [0, file])[0] += 1
    self.notes.append(f"{_TOLD[what]} {kind}: {file}")


def middle(samples: np.ndarray, length: int) -> np.ndarray:  # [n] -> [min(n, length)]
  start = max(0, len(samples) - length) // 2
  return samples[start : start + length]


def speech_clips(path: Path, *, length: int, sample_rate: int, folder: Path) -> Path:
  """The TFDS data set of the clips in a folder or archive, prepared under `folder` if need be.

  Files that cannot be read are no error here: see `report`.

  Returns:
    its folder, for `tfds.builder_from_directory`.
  """
  key = content_hash([identity(path), f"{length} {sample_rate}"])
  config = f"{sample_rate}hz-{key}"
  target = folder / SpeechClips.name / config / str(SpeechClips.VERSION)

  def prepare(temporary: Path) -> None:
    print(f"preparing the clips of {path} in {target}", file=sys.stderr, flush=True)
    tfds.disable_progress_bar()
    whole = temporary / "tfds"
    with opened(path, temporary) as files:
      options = {"length": length, "sample_rate": sample_rate, "config": config}
      builder = prepared(lambda: SpeechClips(files, data_dir=whole, **options))
    for file in Path(builder.data_path).iterdir():
      file.rename(temporary / file.name)
    (temporary / NOTES).write_text("".join(f"{note}\n" for note in builder.notes))
    shutil.rmtree(whole)

  return prepared_folder(target, prepare)


def report(metadata: dict[str, Any], path: Path, folder: Path, *, skip: bool) -> None:
  """Says on stderr how many files were left out, not used or converted: a line for every kind.

  Args:
    metadata: of the data set.
    path: of the files.
    folder: they are prepared in.
    skip: whether to go on without those that cannot be used.

  Raises:
    ValueError: unless `skip`, if there are any that cannot be used.
  """
  if metadata["bad"] and not skip:
    first, count = _first_bad(metadata)
    raise ValueError(
      f"{path}/{first}; files that cannot be used: {count}, each with its reason in "
      f"{folder / NOTES}; data.on_bad=skip goes on without them"
    )
  for what, told in _TOLD.items():
    for kind, (count, example) in metadata[what].items():
      print(f"{path}: files {told} {kind}: {count}, such as {example}", file=sys.stderr)
  if any(metadata[what] for what in _TOLD):
    print(f"{path}: each of these files is in {folder / NOTES}", file=sys.stderr)


def _first_bad(metadata: dict[str, Any]) -> tuple[str, int]:
  """What is wrong with the first file of all that are bad, and their number."""
  kinds = metadata["bad"].values()
  return next(iter(kinds))[1], sum(count for count, _ in kinds)
