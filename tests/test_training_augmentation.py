"""What is done to clips before they are trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform.arch.layers.audio import Analysis, FrontEnd
from triform.arch.training.augmentation import Augmentation, heard

B, N, RATE = 6, 1200, 1000
RNG = np.random.default_rng(0)
CLIPS = RNG.integers(-9000, 9000, (B, N)).astype(np.int16)
TARGETS = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1, 2]]
KEY = jax.random.key(3)


def change(batch=None, key=KEY, **options):
  batch = {"inputs": CLIPS} if batch is None else batch
  x, mask, targets = Augmentation(**options).samples(batch, TARGETS, key, RATE)
  return np.asarray(x), np.asarray(mask), np.asarray(targets)


def test_nothing_asked_for_changes_nothing():
  ends = np.array([N, 5, 700, N, 1, 900])
  mask = np.arange(N)[None] < ends[:, None]
  x, heard_mask, targets = change({"inputs": CLIPS, "mask": mask})
  np.testing.assert_array_equal(x, np.where(mask, CLIPS / np.float32(2**15), 0))
  np.testing.assert_array_equal(heard_mask, mask)
  np.testing.assert_array_equal(targets, TARGETS)
  frames = RNG.standard_normal((B, 7, 5)).astype(np.float32)
  np.testing.assert_array_equal(Augmentation().features(frames, KEY), frames)


def test_the_same_key_does_the_same_and_another_does_not():
  options = {"gain": 6.0, "speed": 0.1, "shift": 100.0, "mixup": 1.0, "noise": 1.0, "prefixes": 1.0}
  first, second, third = (change(key=key, **options) for key in (KEY, KEY, jax.random.key(4)))
  for a, b, c in zip(first, second, third, strict=True):
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_gain_is_within_its_decibels():
  x, _, _ = change(gain=6.0)
  decibels = 20 * np.log10(np.std(x, axis=1) / np.std(CLIPS / 2**15, axis=1))
  assert np.abs(decibels).max() <= 6.001 and np.ptp(decibels) > 1


def test_shifts_bring_zeros_and_move_the_end():
  mask = np.arange(N)[None] < 1000
  batch = {"inputs": CLIPS, "mask": np.broadcast_to(mask, (B, N))}
  x, kept, _ = change(batch, shift=100.0)
  given = np.where(mask, CLIPS / np.float32(2**15), 0)
  shifts = set()
  for row in range(B):
    by = int(kept[row].sum()) - 1000
    shifts.add(by)
    assert -100 <= by <= 100
    expected = np.zeros(N, np.float32)
    expected[max(by, 0) : N + min(by, 0)] = given[row][max(-by, 0) : N - max(by, 0)]
    np.testing.assert_array_equal(x[row], expected)
  assert len(shifts) > 2


def test_speed_moves_frequencies_and_ends():
  tone = np.sin(2 * np.pi * 100 * np.arange(N) / RATE).astype(np.float32)
  mask = np.broadcast_to(np.arange(N)[None] < 900, (B, N))
  x, kept, _ = change({"inputs": np.tile(tone, (B, 1)), "mask": mask}, speed=0.2)
  for row in range(B):
    end = int(kept[row].sum())
    factor = 300 / (end - 600)  # the end was 300 behind the middle
    assert 1 / 1.21 <= factor <= 1.21
    middle = x[row, 400:800] * np.hanning(400)
    peak = np.argmax(np.abs(np.fft.rfft(middle, 8000))) / 8000 * RATE
    assert peak == pytest.approx(100 * factor, rel=0.02)


def test_mixing_shares_sound_and_classes_alike():
  x, _, targets = change(mixup=1.0, mixup_alpha=1.0)
  clean = CLIPS / np.float32(2**15)
  np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
  shares, *_ = np.linalg.lstsq(clean.T, x.T, rcond=None)  # [of, in]
  np.testing.assert_allclose(clean.T @ shares, x.T, atol=1e-5)
  np.testing.assert_allclose(shares.T @ TARGETS, targets, atol=1e-5)
  assert (np.sort(shares, axis=0)[-2] > 0.01).any()
  untouched, _, _ = change(mixup=0.5)
  assert 0 < (untouched == clean).all(axis=1).sum() < B


@pytest.mark.parametrize("recorded", [False, True])
def test_noise_is_as_loud_as_asked_for(recorded):
  batch = {"inputs": CLIPS}
  if recorded:
    batch["noise"] = np.tile(np.arange(N, dtype=np.int16) % 7 - 3, (B, 1)) * 100
  clean = CLIPS / np.float32(2**15)
  x, _, _ = change(batch, noise=1.0, lowest_snr=5.0, highest_snr=10.0)
  noise = x - clean
  snr = 10 * np.log10((clean**2).mean(axis=1) / (noise**2).mean(axis=1))
  assert snr.min() >= 4.99 and snr.max() <= 10.01 and np.ptp(snr) > 0.5
  if recorded:
    values = noise / np.abs(noise).max(axis=1, keepdims=True) * 3
    np.testing.assert_allclose(values, np.round(values), atol=1e-3)
  else:  # from white to brown: the lower half of the spectrum is never the weaker one
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert (power[:, :300].sum(axis=1) > 0.8 * power[:, 300:].sum(axis=1)).all()
  short = {**batch, "mask": np.broadcast_to(np.arange(N)[None] < 300, (B, N))}
  heard_noise = change(short, noise=1.0, lowest_snr=5.0, highest_snr=5.0)[0] - np.where(
    short["mask"], clean, 0
  )
  power = (clean[:, :300] ** 2).mean(axis=1)
  np.testing.assert_allclose(power / (heard_noise**2).mean(axis=1), 10**0.5, rtol=1e-3)
  some, _, _ = change(batch, noise=0.5)
  assert 0 < (some == clean).all(axis=1).sum() < B
  silent = change({**batch, "inputs": np.zeros_like(CLIPS)}, noise=1.0)[0]
  assert not silent.any()


def test_prefixes_have_at_least_their_shortest_length():
  _, mask, _ = change(prefixes=1.0, shortest_prefix=300.0)
  lengths = mask.sum(axis=1)
  assert lengths.min() >= 300 and len(set(lengths.tolist())) > 2
  assert (mask == (np.arange(N)[None] < lengths[:, None])).all()
  assert change(prefixes=0.5)[1].all(axis=1).any()


def test_stripes_of_features_are_hidden():
  frames = np.ones((50, 40, 20), np.float32)
  augment = Augmentation(frequency_masks=2, frequency_width=5, time_masks=1, time_width=8)
  y = np.asarray(augment.features(frames, KEY))
  assert set(np.unique(y)) == {0.0, 1.0}
  columns, rows = (y == 0).all(axis=1), (y == 0).all(axis=2)
  assert ((y == 0) == (rows[:, :, None] | columns[:, None])).all()
  assert columns.sum(axis=1).max() <= 8 and rows.sum(axis=1).max() <= 7
  assert columns.any(axis=0).all() and rows.any(axis=0)[1:-1].all()


def test_a_model_hears_what_was_changed():
  front_end = FrontEnd(Analysis(sample_frequency=RATE, num_mel_bins=6))
  batch = {"inputs": jnp.asarray(CLIPS)}
  frames, real, targets = heard(front_end, Augmentation(), batch, TARGETS, KEY)
  np.testing.assert_array_equal(frames, front_end(CLIPS)[0])
  assert real.all() and (np.asarray(targets) == TARGETS).all()
  augment = Augmentation(prefixes=1.0, shortest_prefix=100.0)
  _, real, _ = heard(front_end, augment, batch, TARGETS, KEY)
  assert not real.all() and real[:, 0].all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"noise": 1.5}, "augment.noise is 1.5, expected a probability"),
    ({"shift": -1.0}, "augment.shift is -1.0, expected at least 0"),
    ({"mixup_alpha": 0.0}, "augment.mixup_alpha is 0.0, expected a positive number"),
    ({"lowest_snr": 30.0}, "augment.lowest_snr is 30.0, expected at most highest_snr, 20.0"),
  ],
)
def test_what_cannot_be_is_told(options, message):
  with pytest.raises(ValueError, match=message):
    Augmentation(**options)


def test_every_field_has_a_line():
  for field in dataclasses.fields(Augmentation):
    assert field.name in Augmentation.__doc__
