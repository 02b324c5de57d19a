"""Causal HyperMixing in float64 NumPy, one token at a time: the oracle of every form."""

import math

import numpy as np

ACTIVATIONS = {
  "gelu": np.vectorize(lambda z: 0.5 * z * math.erfc(-z / math.sqrt(2)), otypes=[float]),
  "relu": lambda z: np.maximum(z, 0),
}


def causal_hypermixing(
  w1,
  w2,
  v,
  log_decay=None,
  *,
  scale=None,
  rms=None,
  activation="gelu",
  state=None,
  reset=None,
  mask=None,
):
  """`S_n = exp(log_decay) S_{n-1} + w1_n v_n^T`, `y_n = act(scale_n S_n)^T w2_n`.

  Arguments as in `triform.kernels.causal_hypermixing`. A `reset` token clears the state before it
  is added; a masked token leaves the state alone, and its output is 0.
  """
  w1, w2, v = (np.asarray(a, np.float64) for a in (w1, w2, v))
  b, t, h, k = w1.shape
  decay = np.exp(np.zeros(h) if log_decay is None else np.asarray(log_decay, np.float64))
  scale = np.broadcast_to(1.0 if scale is None else np.asarray(scale, np.float64), (b, t, h))
  reset = np.zeros((b, t), bool) if reset is None else np.asarray(reset)
  mask = np.ones((b, t), bool) if mask is None else np.asarray(mask)
  state = np.zeros((b, h, k, v.shape[-1])) if state is None else np.array(state, np.float64)
  out = np.zeros_like(v)
  for row in range(b):
    for n in range(t):
      if not mask[row, n]:
        continue
      kept = 0.0 if reset[row, n] else decay[:, None, None] * state[row]
      state[row] = kept + w1[row, n][:, :, None] * v[row, n][:, None, :]
      z = state[row]
      if rms is not None:
        axes = {"row": -1, "head": (-2, -1)}[rms]
        z = z / np.sqrt(np.mean(z**2, axis=axes, keepdims=True) + 1e-6)
      z = ACTIVATIONS[activation](scale[row, n][:, None, None] * z)
      out[row, n] = np.einsum("hkv,hk->hv", z, w2[row, n])
  return out, state
