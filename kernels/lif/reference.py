"""Leaky integrate-and-fire neurons in float64 NumPy, one token at a time: the oracle."""

import numpy as np


def lif(
  x,
  *,
  tau=2.0,
  threshold=1.0,
  reset_value=0.0,
  decay_input=True,
  state=None,
  reset=None,
  mask=None,
):
  """`h = v + (x - (v - r)) / tau`, a spike where `h >= threshold`, then the reset.

  Arguments as in `triform.kernels.lif`. A `reset` token starts at rest, a masked one leaves the
  state alone and has no spikes.

  Returns:
    Spikes, final state, and the potentials `h` before their resets (NaN at masked tokens).
  """
  x, tau = np.asarray(x, np.float64), np.asarray(tau, np.float64)
  b, t, d = x.shape
  rest = 0.0 if reset_value is None else reset_value
  reset = np.zeros((b, t), bool) if reset is None else np.asarray(reset)
  mask = np.ones((b, t), bool) if mask is None else np.asarray(mask)
  state = np.full((b, d), rest) if state is None else np.array(state, np.float64)
  spikes, potentials = np.zeros_like(x), np.full_like(x, np.nan)
  for row in range(b):
    for n in range(t):
      if not mask[row, n]:
        continue
      v, current = np.full(d, rest) if reset[row, n] else state[row], x[row, n]
      h = v + (current - (v - rest)) / tau if decay_input else v - (v - rest) / tau + current
      s = h >= threshold
      state[row] = h - s * threshold if reset_value is None else np.where(s, reset_value, h)
      spikes[row, n], potentials[row, n] = s, h
  return spikes, state, potentials
