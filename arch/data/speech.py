"""Spoken words to tell apart, as samples: Speech Commands and data sets laid out like it.

P. Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", arXiv 1804.03209.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ..caches import cache_folder
from . import tfds_sets
from .speech_builder import NOISE_SPLIT, middle, report, speech_clips
from .speech_files import check_path
from .speech_lists import SPLITS

SILENCE, UNKNOWN = "_silence_", "_unknown_"
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")

_SHARE = 10  # per cent that silence and other words are, of the clips of the ten words
_CACHED_BYTES = 2**29
# Where the parts of a recording of noise begin and end, in tenths.
_NOISE_PARTS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}


class SpeechCommands:
  """The clips in a folder or archive, or those of a TFDS data set.

  With `classes="all"` every word is a class. With "12" they are the ten of `WORDS`, `_silence_` and
  `_unknown_`, as in the paper: some of the other words, and cuts of the recordings of noise at a
  random volume, each a tenth as many as the clips of the ten words in the split. No two splits
  share a part of a recording. A set that has `_silence_` or `_unknown_` clips keeps those.

  Clips are prepared once for fast access, in the cache folder, and read from there; when a file
  changes, all are prepared anew.

  Args:
    path: the folder or the archive (`.tar`, `.tar.gz`): see `speech_files` and `speech_lists`.
    classes: "all" or "12".
    seconds: of a sequence; longer clips are cut to their middle.
    sample_rate: samples a second, to which others are resampled.
    on_bad: "error" for the files that cannot be used, or "skip" to go on without them.
    seed: of the choice of other words, and of the places and volumes in the noise.
    tfds: the name of a TFDS data set instead of `path`, such as "speech_commands", which has
      features `audio` and `label`; its classes are taken as they are.
    dir: where to keep what is prepared; default `cache_folder()`.

  Raises:
    ValueError: for options or files that cannot be.
  """

  labels: tuple[str, ...]
  length: int

  def __init__(
    self,
    path: str | None,
    *,
    classes: str = "all",
    seconds: float = 1.0,
    sample_rate: int = 16000,
    on_bad: str = "error",
    seed: int = 0,
    tfds: str | None = None,
    dir: str | None = None,
  ):
    if (path is None) == (tfds is None):
      raise ValueError(f"data.path is {path} and data.tfds is {tfds}, expected exactly one of them")
    if str(classes) not in ("all", "12"):
      raise ValueError(f"data.classes is {classes!r}, expected 'all' or '12'")
    if on_bad not in ("error", "skip"):
      raise ValueError(f"data.on_bad is {on_bad!r}, expected 'error' or 'skip'")
    if not 1000 <= sample_rate < 400_000 or sample_rate != int(sample_rate):
      raise ValueError(f"data.sample_rate is {sample_rate}, expected 1000 to 399999 Hz")
    if not 0 < seconds < math.inf or round(seconds * sample_rate) < 1:
      raise ValueError(f"data.seconds is {seconds}, expected at least one sample")
    sample_rate = int(sample_rate)
    self.length = round(seconds * sample_rate)
    self._seed = seed
    folder = (cache_folder() if dir is None else Path(dir).expanduser()) / "tfds"
    if path is None:
      self._open_tfds(tfds, folder, sample_rate)
    else:
      self._open_files(check_path(path), folder, sample_rate, skip=on_bad == "skip")
      if str(classes) == "12":
        self._choose_twelve()

  def _open_files(self, path: Path, folder: Path, sample_rate: int, *, skip: bool) -> None:
    self._where = str(path)
    self._folder = speech_clips(path, length=self.length, sample_rate=sample_rate, folder=folder)
    metadata = _builder(self._folder).info.metadata
    report(
      {name: metadata[name] for name in ("bad", "converted", "unused")},  # loaded when asked for
      path,
      self._folder,
      skip=skip,
    )
    self._noise_lengths = tuple(metadata["lengths"])
    names = np.array(metadata["names"])
    self._classes = {
      split: names[np.array(numbers, int)] for split, numbers in metadata["classes"].items()
    }
    self._silence = self._unknown = False
    self.labels = tuple(map(str, np.unique(np.concatenate(list(self._classes.values())))))

  def _choose_twelve(self) -> None:
    found = set(self.labels)
    if missing := [word for word in WORDS if word not in found]:
      raise ValueError(
        f"data.classes is 12, expected clips of its ten words, but {self._where} has none of "
        f"{', '.join(missing)}"
      )
    self._silence, self._unknown = SILENCE not in found, UNKNOWN not in found
    if self._silence and not self._noise_lengths:
      raise ValueError(
        f"data.classes is 12, expected recordings in _background_noise_ to cut {SILENCE} from, but "
        f"{self._where} has none, nor clips of {SILENCE}"
      )
    if self._unknown and not found - {*WORDS, SILENCE}:
      raise ValueError(
        f"data.classes is 12, expected clips of other words for {UNKNOWN}, but {self._where} has "
        "none"
      )
    self.labels = (SILENCE, UNKNOWN, *WORDS)

  def _open_tfds(self, name: str, folder: Path, sample_rate: int) -> None:
    self._where = f"the TFDS set {name}"
    builder = tfds_sets.prepared_builder(name, folder)
    self._folder = Path(builder.data_path)
    features = builder.info.features
    if not {"audio", "label"} <= set(features):
      raise ValueError(f"{self._where} has {', '.join(features)}, expected audio and label")
    audio, label = features["audio"], features["label"]
    if not isinstance(label, tfds.features.ClassLabel) or not label.names:
      raise ValueError(f"{self._where} has a label without names, expected a class")
    if len(audio.shape) != 1 or np.dtype(audio.np_dtype).kind != "i":
      raise ValueError(
        f"{self._where} has audio {np.dtype(audio.np_dtype)}{list(audio.shape)}, expected integers "
        "of one channel"
      )
    rate = getattr(audio, "sample_rate", None)
    if rate not in (None, sample_rate):
      raise ValueError(f"data.sample_rate is {sample_rate}, expected that of {self._where}, {rate}")
    self._noise_lengths, self._classes = (), None
    self.labels = tuple(label.names)

  def examples(self, split: str) -> "SpokenWords":
    """The clips of "train", "validation" or "test"."""
    if split not in SPLITS:
      raise ValueError(f"the split is {split!r}, expected one of {', '.join(SPLITS)}")
    if split not in _builder(self._folder).info.splits:
      raise ValueError(f"{self._where} has no clips for the split {split!r}")
    clips, noise = _Records(self._folder, split), None
    if self._classes is None:
      indices, targets, silence = np.arange(len(clips)), None, 0
    else:
      indices, targets, silence = self._chosen(split)
    if self._noise_lengths and (split == "train" or silence):
      noise = self._noise(split)
    return SpokenWords(
      clips,
      indices,
      targets,
      length=self.length,
      noise=noise,
      silence=silence,
      silence_class=self.labels.index(SILENCE) if silence else 0,
      add_noise=split == "train",
    )

  def noise(self, split: str) -> list[np.ndarray]:  # int16[n] each
    """The parts of the recordings of noise, if there are any, that belong to a split."""
    return self._noise(split).parts() if self._noise_lengths else []

  def _noise(self, split: str) -> "_Noise":
    recordings = _Records(self._folder, NOISE_SPLIT)
    return _Noise(recordings, self._noise_lengths, split, self.length, self._seed)

  def _chosen(self, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The records of a split, their classes by number, and how many of silence come with them."""
    classes = self._classes[split]  # str[n]
    number = {name: i for i, name in enumerate(self.labels)}
    words = np.isin(classes, WORDS).sum()
    extra = math.ceil(words * _SHARE / 100)
    named = [i for i, name in enumerate(classes) if name in number]
    targets = {i: number[classes[i]] for i in named}
    if self._unknown:
      others = [i for i in range(len(classes)) if i not in targets]
      others.sort(key=lambda i: _draws(1, self._seed, UNKNOWN, split, i)[0])
      targets |= dict.fromkeys(others[:extra], number[UNKNOWN])
    if not targets:
      raise ValueError(f"{self._where} has no clips of {', '.join(self.labels)} for {split!r}")
    indices = np.array(sorted(targets), np.int64)
    values = np.array([targets[i] for i in indices], np.int32)
    return indices, values, extra if self._silence else 0


class SpokenWords:
  """Clips by number, each a row of a batch: see `training.tasks.classification.LabelledData`.

  A row is `inputs` `int16[length]`, `mask` `bool[length]`, false where the clip is over, `targets`
  and `loss_mask`; to train on also `noise` `int16[length]`, if there are recordings of it.
  """

  def __init__(
    self,
    clips: "_Records",
    indices: np.ndarray,  # [n]
    targets: np.ndarray | None,  # [n]; None: the records know
    *,
    length: int,
    noise: "_Noise | None",
    silence: int,
    silence_class: int,
    add_noise: bool,
  ):
    self._clips, self._indices, self._targets = clips, indices, targets
    self._length, self._noise = length, noise
    self._silence, self._silence_class = silence, silence_class
    self._add_noise = add_noise

  def __len__(self) -> int:
    return len(self._indices) + self._silence

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not -len(self) <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    index = int(index) % len(self)
    if index >= len(self._indices):
      samples, target = self._noise.silence(index - len(self._indices)), self._silence_class
    else:
      samples, target = self._clips[int(self._indices[index])]
      samples = middle(samples, self._length)
      if self._targets is not None:
        target = self._targets[index]
    inputs = np.zeros(self._length, np.int16)
    inputs[: len(samples)] = samples
    row = {
      "inputs": inputs,
      "mask": np.arange(self._length) < len(samples),
      "targets": np.int32(target),
      "loss_mask": np.bool_(True),
    }
    if self._add_noise and self._noise is not None:
      row["noise"] = self._noise.cut("noise", index)
    return row


class _Noise:
  """Cuts of that part of the recordings of noise which belongs to a split."""

  def __init__(
    self, recordings: "_Records", lengths: tuple[int, ...], split: str, length: int, seed: int
  ):
    self._recordings, self._lengths = recordings, lengths
    self._split, self._length, self._seed = split, length, seed

  def silence(self, number: int) -> np.ndarray:  # int16[length]
    volume = _draws(1, self._seed, SILENCE, self._split, number)[0]
    return np.rint(self.cut("silence", number) * volume).astype(np.int16)

  def parts(self) -> list[np.ndarray]:  # int16[n] each
    bounds = [self._bounds(i) for i in range(len(self._lengths))]
    return [self._recordings[i][0][begin:end] for i, (begin, end) in enumerate(bounds)]

  def _bounds(self, recording: int) -> tuple[int, ...]:
    return tuple(self._lengths[recording] * tenth // 10 for tenth in _NOISE_PARTS[self._split])

  def cut(self, use: str, number: int) -> np.ndarray:  # int16[length]
    recording, place = _draws(2, self._seed, use, self._split, number)
    recording = int(recording * len(self._lengths))
    begin, end = self._bounds(recording)
    start = begin + int(place * (end - begin - self._length + 1))
    return self._recordings[recording][0][start : start + self._length]


class _Records:
  """`records[i]`, the samples and the label of a split's record, in any thread or process.

  Small splits stay in memory once they are read.
  """

  def __init__(self, folder: Path, split: str):
    self._folder, self._split = folder, split
    self._open()

  def _open(self) -> None:
    builder = _builder(self._folder)
    with tfds_sets.explained(f"cannot read the split {self._split} of {self._folder}"):
      self._source = builder.as_data_source(self._split)
    small = int(builder.info.splits[self._split].num_bytes or _CACHED_BYTES) < _CACHED_BYTES
    self._cache: dict[int, tuple[np.ndarray, Any]] | None = {} if small else None

  def __getstate__(self) -> tuple[Path, str]:
    return self._folder, self._split

  def __setstate__(self, state: tuple[Path, str]) -> None:
    self._folder, self._split = state
    self._open()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
    if self._cache is not None and index in self._cache:
      return self._cache[index]
    record = self._source[index]
    found = np.asarray(record["audio"], np.int16), record["label"]
    if self._cache is not None:
      self._cache[index] = found
    return found


def _builder(folder: Path) -> tfds.core.DatasetBuilder:
  with tfds_sets.explained(f"cannot read the data set in {folder}"):
    return tfds.builder_from_directory(folder)


def _draws(count: int, *of: Any) -> list[float]:
  """Numbers from 0 to below 1 that depend on `of` alone, on every machine and for all time."""
  digest = hashlib.blake2b(repr(of).encode(), digest_size=8 * count).digest()
  return [(number >> 11) * 2.0**-53 for number in np.frombuffer(digest, "<u8").tolist()]
