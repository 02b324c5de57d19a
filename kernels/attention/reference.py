"""Attention in float64 NumPy, one token at a time: the oracle every other form is held to."""

import numpy as np


def attention(q, k, v, *, window=None, bias=None, scale=None, tanh=False, reset=None, mask=None):
  """`o_i = sum_j softmax_j(scale q_i k_j + bias[i - j]) v_j` over the document so far.

  Arguments as in `triform.kernels.attention`, without a cache. Outputs of padding are 0.
  """
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  b, t, h, size = q.shape
  per_kv_head = h // k.shape[2]
  k, v = (np.repeat(a, per_kv_head, axis=2) for a in (k, v))
  scale = size**-0.5 if scale is None else scale
  out = np.zeros_like(q)
  for row in range(b):
    document = []
    for n in range(t):
      if mask is not None and not mask[row, n]:
        continue
      if reset is not None and reset[row, n]:
        document = []
      document.append(n)
      seen = document[-(window or t) :]
      scores = scale * np.einsum("hk,jhk->hj", q[row, n], k[row, seen])
      if bias is not None:
        distance = np.arange(len(seen))[::-1]
        scores += np.asarray(bias)[:, np.minimum(distance, np.shape(bias)[1] - 1)]
      weights = np.exp(scores - scores.max(axis=1, keepdims=True))
      weights /= weights.sum(axis=1, keepdims=True)
      weights = np.tanh(weights) if tanh else weights
      out[row, n] = np.einsum("hj,jhk->hk", weights, v[row, seen])
  return out
