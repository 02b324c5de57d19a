"""Small data sets of spoken words for tests."""

import tarfile
import wave
from pathlib import Path

import numpy as np

from triform.arch.data.speech import WORDS, SpeechCommands

RATE = 1000  # Hz; a row has as many samples

SPEAKER = {"train": "b87bdb22", "validation": "a7dd45cf", "test": "6e916de8"}


def write_clip(path: Path, samples, *, channels=1, rate=RATE) -> np.ndarray:
  samples = np.asarray(samples, np.int16)
  path.parent.mkdir(parents=True, exist_ok=True)
  with wave.open(str(path), "wb") as writer:
    writer.setparams((channels, 2, rate, 0, "NONE", ""))
    writer.writeframes(samples.tobytes())
  return samples


def write_words(root: Path, words, counts, length=RATE) -> dict[str, np.ndarray]:
  """For each word as many clips by split as `counts` says, each with a number of its own."""
  clips = {}
  for word in words:
    for split, count in counts.items():
      for k in range(count):
        name = f"{word}/{SPEAKER[split]}_nohash_{k}.wav"
        clips[name] = write_clip(root / name, np.full(length, len(clips) + 1))
  return clips


def write_noise(root: Path, count=2, length=20 * RATE) -> None:
  """Recordings whose samples tell where they are, by tens, and which it is."""
  for k in range(count):
    samples = np.arange(length) // 2 + 10000 * k + 1000
    write_clip(root / "_background_noise_" / f"noise{k}.wav", samples)


def pack(root: Path, archive: Path) -> Path:
  """An archive as the official ones are, its members in an order of its own."""
  with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
    tar.add(root, "./", recursive=False)
    for path in sorted(root.rglob("*"), reverse=True):
      tar.add(path, f"./{path.relative_to(root)}", recursive=False)
  return archive


def opener(tmp_path):
  """`opened(path, **options)`, a data set of small clips, prepared in a folder of the test."""

  def open_data(path=tmp_path / "data", **options):
    options = {"sample_rate": RATE, "dir": str(tmp_path / "cache"), **options}
    return SpeechCommands(None if path is None else str(path), **options)

  return open_data


def rows(data, split):
  examples = data.examples(split)
  return [examples[i] for i in range(len(examples))]


def contents(data, split):
  return sorted((data.labels[row["targets"]], int(row["inputs"][0])) for row in rows(data, split))


def assert_same(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right, strict=True):
    assert one.keys() == other.keys()
    for name, array in one.items():
      np.testing.assert_array_equal(array, other[name])


def write_twelve(root: Path, noise=True) -> Path:
  write_words(root, WORDS, {"train": 3, "validation": 2, "test": 1}, length=5)
  write_words(root, ("bed", "cat", "dog"), {"train": 3, "validation": 1, "test": 1}, length=5)
  if noise:
    write_noise(root)
  return root
