"""Retention in float64 NumPy, one token at a time: the oracle every other form is held to."""

import numpy as np


def retention(q, k, v, log_decay, *, state=None, reset=None, mask=None):
  """`S_n = exp(log_decay_n) S_{n-1} + k_n v_n^T`, `o_n = S_n^T q_n` (RetNet, section 2.1).

  Arguments as in `triform.kernels.retention`. A `reset` token clears the state before it is
  added; a masked token leaves the state alone and reads it as it is.
  """
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  b, t, h, _ = q.shape
  per_kv_head = h // k.shape[2]
  k, v = (np.repeat(a, per_kv_head, axis=2) for a in (k, v))
  decay = np.exp(np.broadcast_to(np.asarray(log_decay, np.float64), (b, t, h)))
  reset = np.zeros((b, t), bool) if reset is None else np.asarray(reset)
  mask = np.ones((b, t), bool) if mask is None else np.asarray(mask)
  shape = (b, h, k.shape[-1], v.shape[-1])
  state = np.zeros(shape) if state is None else np.array(state, np.float64)
  out = np.zeros((b, t, h, v.shape[-1]))
  for row in range(b):
    for n in range(t):
      if mask[row, n]:
        kept = 0.0 if reset[row, n] else decay[row, n][:, None, None] * state[row]
        state[row] = kept + k[row, n][:, :, None] * v[row, n][:, None, :]
      out[row, n] = np.einsum("hkv,hk->hv", state[row], q[row, n])
  return out, state


def head_norm(o, position, log_decay, *, eps, weight=None):
  """`o / sqrt(mean(o^2) + eps s_n^2)` with `s_n^2` summed term by term; see the JAX version."""
  o = np.asarray(o, np.float64)
  scale = np.ones((*o.shape[:2], 1, 1))
  if log_decay is not None:
    decay = np.exp(np.asarray(log_decay, np.float64))  # [h]
    powers = decay[:, None] ** np.arange(int(np.max(position)) + 1)
    scale = np.cumsum(powers, axis=1).T[np.asarray(position)][..., None]
  normed = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + eps * scale)
  return normed if weight is None else normed * np.asarray(weight, np.float64)
