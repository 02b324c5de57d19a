"""The Legendre memory in float64 NumPy, one token at a time: the oracle of every form."""

import numpy as np
import scipy.linalg


def discretise(order, theta, discretizer="zoh"):  # [n, n], [n]
  """`Abar` and `Bbar`, the zero-order hold as the exponential of the system with its input."""
  a, b = np.zeros((order, order)), np.zeros(order)
  for i in range(order):
    b[i] = (2 * i + 1) / theta * (-1) ** i
    for j in range(order):
      a[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
  if discretizer == "euler":
    return np.eye(order) + a, b
  whole = np.zeros((order + 1, order + 1))
  whole[:order, :order], whole[:order, order] = a, b
  whole = scipy.linalg.expm(whole)
  return whole[:order, :order], whole[:order, order]


def lmu(u, *, order, theta, discretizer="zoh", kernel=None, state=None, reset=None, mask=None):
  """`m_t = Abar m_{t-1} + Bbar u_t`; arguments as in `triform.kernels.lmu`.

  A `reset` token clears the memory before it is added; a masked token leaves the memory alone, and
  its output is 0.
  """
  u = np.asarray(u, np.float64)
  b, t, d = u.shape
  abar, bbar = discretise(order, theta, discretizer)
  reset = np.zeros((b, t), bool) if reset is None else np.asarray(reset)
  mask = np.ones((b, t), bool) if mask is None else np.asarray(mask)
  state = np.zeros((b, d, order)) if state is None else np.array(state, np.float64)
  m = np.zeros((b, t, d, order))
  for row in range(b):
    for n in range(t):
      if not mask[row, n]:
        continue
      before = 0.0 * state[row] if reset[row, n] else state[row]
      state[row] = before @ abar.T + u[row, n][:, None] * bbar
      m[row, n] = state[row]
  return (m if kernel is None else np.einsum("btdn,dno->bto", m, kernel)), state
