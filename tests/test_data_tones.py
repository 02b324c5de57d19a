"""Made-up words that need no download."""

import numpy as np
import pytest

from triform.arch.data.tones import SAMPLE_RATE, VOWELS, Tones


def test_a_clip_is_a_function_of_its_number():
  data = Tones(examples=40, seed=3)
  train, test = data.examples("train"), data.examples("test")
  assert (len(train), len(data.examples("validation")), len(test)) == (40, 10, 10)
  row = train[7]
  assert row["inputs"].shape == (Tones.length,) and row["inputs"].dtype == np.int16
  assert row["targets"] == 7 and row["targets"].dtype == np.int32 and row["loss_mask"]
  np.testing.assert_array_equal(
    row["inputs"], Tones(examples=9, seed=3).examples("train")[7]["inputs"]
  )
  for other in (train[17], test[7], Tones(examples=40, seed=4).examples("train")[7]):
    assert (other["inputs"] != row["inputs"]).any()
  classes = [int(train[i]["targets"]) for i in range(40)]
  assert classes == [*range(10)] * 4


def test_words_glide_between_the_formants_of_their_vowels():
  words = Tones(examples=10, noise=60.0).examples("train")
  for row in (words[i] for i in range(10)):
    x = row["inputs"].astype(float)
    loud = np.flatnonzero(np.abs(x) > 0.2 * np.abs(x).max())
    begin, length = loud[0], loud[-1] - loud[0]
    for vowel, start in zip(
      Tones.labels[row["targets"]], (begin, loud[-1] - length // 4), strict=True
    ):
      part = x[start : start + length // 4]
      spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), SAMPLE_RATE))
      assert 0.83 < np.argmax(spectrum[:1100]) / VOWELS[vowel][0] < 1.25


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"examples": 3}, "data.examples is 3, expected at least 4"),
    ({"seed": -1}, "data.seed is -1, expected at least 0"),
    ({"noise": float("nan")}, "data.noise is nan, expected -100 to 100 decibels"),
  ],
)
def test_what_cannot_be_is_told(options, message):
  with pytest.raises(ValueError, match=message):
    Tones(**options)


def test_there_are_no_other_splits_and_rows():
  with pytest.raises(ValueError, match="the split is 'tset', expected one of train, validation"):
    Tones().examples("tset")
  assert len(list(Tones(examples=8).examples("test"))) == 2
