"""Made-up words: two vowels, gliding into each other, in noise.

A data set for speech that needs no download: sweeps of two formants stand for speech, so that what
a recogniser does, from samples to decisions, can be tried anywhere. It is far easier than speech.
"""

import numpy as np

VOWELS = {"a": (750, 1250), "e": (550, 1800), "i": (280, 2250), "o": (500, 900), "u": (300, 750)}
SAMPLE_RATE = 16000
_SPLITS = {"train": 0, "validation": 1, "test": 2}


class Tones:
  """Clips of a second at 16 kHz, each a function of the seed, its split and its number.

  A word is a sound whose formants, at the frequencies of one vowel (averages of men, Peterson and
  Barney, 1952, rounded), glide to another's; the two orders of a pair are two words. Pitch, size of
  the speaker, length, place, loudness and white noise are random.

  Args:
    examples: clips to train on; there are a quarter as many in "validation" and "test".
    noise: the lowest ratio of a clip's word to its noise, in decibels; the highest is 30 more.
    seed: of everything.

  Raises:
    ValueError: for a number that cannot be.
  """

  labels = ("ae", "ai", "au", "ea", "ia", "iu", "oi", "io", "ua", "ui")
  length = SAMPLE_RATE

  def __init__(self, *, examples: int = 2000, noise: float = 0.0, seed: int = 0):
    if examples < 4:
      raise ValueError(f"data.examples is {examples}, expected at least 4")
    if not -100 <= noise <= 100:
      raise ValueError(f"data.noise is {noise}, expected -100 to 100 decibels")
    if seed < 0:
      raise ValueError(f"data.seed is {seed}, expected at least 0")
    self._examples, self._noise, self._seed = examples, noise, seed

  def examples(self, split: str) -> "Words":
    """The clips of "train", "validation" or "test"."""
    if split not in _SPLITS:
      raise ValueError(f"the split is {split!r}, expected one of {', '.join(_SPLITS)}")
    count = self._examples if split == "train" else self._examples // 4
    return Words((self._seed, _SPLITS[split]), count, self._noise)


class Words:
  """Clips by number, each a row of a batch: see `training.tasks.classification.LabelledData`."""

  def __init__(self, seed: tuple[int, int], count: int, noise: float):
    self._seed, self._count, self._noise = seed, count, noise

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < self._count:
      raise IndexError(f"row {index} of {self._count}")
    target = index % len(Tones.labels)
    rng = np.random.default_rng((*self._seed, index))
    return {
      "inputs": _clip(Tones.labels[target], self._noise, rng),
      "targets": np.int32(target),
      "loss_mask": np.bool_(True),
    }


def _clip(word: str, noise: float, rng: np.random.Generator) -> np.ndarray:  # int16[n]
  n = Tones.length
  length = int(rng.uniform(0.35, 0.7) * n)
  start = rng.integers(0, n - length)
  time = np.linspace(0, 1, length)
  glide = 1 / (1 + np.exp(-12 * (time - rng.uniform(0.4, 0.6))))
  first, second = (np.array(VOWELS[vowel]) for vowel in word)
  formants = (first[:, None] * (1 - glide) + second[:, None] * glide) * rng.uniform(0.85, 1.15)
  tones = np.sin(2 * np.pi * (np.cumsum(formants, axis=1) / SAMPLE_RATE + rng.random((2, 1))))
  voice = np.cos(2 * np.pi * rng.uniform(90, 220) * np.arange(length) / SAMPLE_RATE)
  sound = (tones[0] + rng.uniform(0.3, 0.8) * tones[1]) * (1 + voice) * np.sin(np.pi * time) ** 0.5
  clip = rng.standard_normal(n) * 10 ** (-rng.uniform(noise, noise + 30) / 20)
  clip[start : start + length] += sound / sound.std()
  clip *= rng.uniform(0.02, 0.2)
  return np.clip(np.round(clip * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
