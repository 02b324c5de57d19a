"""The causal depthwise convolution, against a loop over tokens."""

import jax
import numpy as np
import pytest
from laws_errors import EXACT

from triform.kernels import causal_depthwise_conv

B, T, D = 2, 9, 3


def oracle(x, taps, tail, reset, mask):
  y, after = np.zeros_like(x), tail.copy()
  for row in range(len(x)):
    past = list(tail[row])
    for n in range(x.shape[1]):
      if mask[row, n]:
        past = [np.zeros(D)] * (len(taps) - 1) if reset[row, n] else past
        past.append(x[row, n])
        y[row, n] = sum(tap * past[-1 - s] for s, tap in enumerate(taps))
    after[row] = np.reshape(past[len(past) - (len(taps) - 1) :], after[row].shape)
  return y, after


@pytest.mark.parametrize("num_taps", [1, 3, 5])
@pytest.mark.parametrize("flags", ["none", "reset", "mask", "both"])
def test_is_the_loop(num_taps, flags):
  rng = np.random.default_rng(num_taps)
  x, taps = rng.normal(size=(B, T, D)), rng.normal(size=(num_taps, D))
  tail = rng.normal(size=(B, num_taps - 1, D))
  reset = rng.random((B, T)) < (0.3 if flags in ("reset", "both") else 0)
  mask = rng.random((B, T)) < (0.7 if flags in ("mask", "both") else 2)
  y, after = oracle(x, taps, tail, reset, mask)
  junk = np.where(mask[..., None], x, np.nan)
  given = {"reset": reset} if flags in ("reset", "both") else {}
  given |= {"mask": mask} if flags in ("mask", "both") else {}
  with jax.enable_x64():
    got, new = causal_depthwise_conv(junk, taps, tail=tail, **given)
  assert np.abs(np.asarray(got) - y)[mask].max() <= EXACT
  np.testing.assert_array_equal(new, after)


def test_a_masked_call_keeps_the_tail_bit_for_bit():
  x, tail = np.ones((B, T, D), np.float32), np.full((B, 2, D), -0.0, np.float32)
  flags = {"reset": np.ones((B, T), bool), "mask": np.zeros((B, T), bool)}
  _, after = causal_depthwise_conv(x, np.ones((3, D), np.float32), tail=tail, **flags)
  assert np.asarray(after).tobytes() == tail.tobytes()
