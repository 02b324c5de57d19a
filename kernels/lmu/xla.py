"""The forms of a Legendre memory in plain XLA.

The caller has moved the real tokens of every row to its front, u is 0 behind them, and
`begins` [b, t] is true where a document does. Memories are [b, t, d, n], in the dtype of u.
Products with tables are in full precision: a bfloat16 pass over `Abar` would make the window
several times too long.
"""

import functools

import jax
import jax.numpy as jnp
import scipy.fft

from .tables import Tables

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def recurrent(u, tables: Tables, state, begins, total):
  """One token after another: `m_t = Abar m_{t-1} + Bbar u_t`, and the state after `total`."""
  abar, bbar = tables.powers(1)[1], tables.impulse_response(1)[0]

  def step(before, token):
    u, begins, real = token
    if begins is not None:
      before = jnp.where(begins[:, None, None], 0, before)
    m = einsum("bdo,po->bdp", before, abar) + u[..., None] * bbar[None, None]
    return (m if real is None else jnp.where(real[:, None, None], m, before)), m

  real = None if total is None else jnp.arange(u.shape[1])[None] < total[:, None]
  tokens = jax.tree.map(lambda a: a.swapaxes(0, 1), (u, begins, real))
  final, m = jax.lax.scan(step, state, tokens)
  return m.swapaxes(0, 1), final


def pieces(u, tables: Tables, state, begins, c: int):
  """The memory of all tokens, in pieces of `c`: products within, and the state before each.

      m_i = sum_{k <= i} H_k u_{i-k} + Abar^{i+1} m_before

  of which the sum stops, and the second term is absent, where a document began.
  """
  b, t, d = u.shape
  c = min(c, t)
  u = _cut(u, c).transpose(0, 1, 3, 2)  # [b, n, d, c]
  first = None
  if begins is not None:
    first = jax.lax.cummax(jnp.where(_cut(begins, c), jnp.arange(c)[None, None], -1), axis=2)
  response = tables.impulse_response(c)
  m = einsum("bndik,ko->bnido", _shifted(u, first), response[::-1])
  if state is None and u.shape[1] == 1:
    return m.reshape(b, -1, d, tables.order)[:, :t]
  powers = tables.powers(c)[1:]

  def step(before, piece):
    last, fresh = piece
    after = einsum("bdo,po->bdp", before, powers[-1])
    if fresh is not None:
      after = jnp.where(fresh[:, None, None], 0, after)
    return after + last, before

  if state is None:
    state = jnp.zeros((b, d, tables.order), u.dtype)
  fresh = None if first is None else first[:, :, -1].swapaxes(0, 1) >= 0
  _, before = jax.lax.scan(step, state, (m[:, :, -1].swapaxes(0, 1), fresh))
  left = einsum("nbdo,ipo->bnidp", before, powers)
  if first is not None:
    left = jnp.where((first < 0)[..., None, None], left, 0)
  return (m + left).reshape(b, -1, d, tables.order)[:, :t]


def _cut(a, c):
  """[b, t, ...] to [b, n, c, ...], with zeros up to a multiple of c."""
  a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % c)] + [(0, 0)] * (a.ndim - 2))
  return a.reshape(a.shape[0], -1, c, *a.shape[2:])


def _shifted(u, first):
  """`u_{i-k}` at [..., i, c - 1 - k]: u [b, n, d, c] to [b, n, d, c, c], 0 before a document.

  Rows of a long row that is repeated, each one element longer than it: copies, no gather.
  """
  *batch, c = u.shape
  padded = jnp.pad(u, [(0, 0)] * len(batch) + [(c, 0)])
  repeated = jnp.broadcast_to(padded[..., None, :], (*batch, c + 1, 2 * c)).reshape(*batch, -1)
  shifted = repeated[..., : c * (2 * c + 1)].reshape(*batch, c, 2 * c + 1)[..., 1 : c + 1]
  if first is None:
    return shifted
  since = jnp.arange(c)[None, None] - jnp.maximum(first, 0)
  inside = jnp.arange(c)[None, None, None, ::-1] <= since[..., None]
  return jnp.where(inside[:, :, None], shifted, 0)


def convolve(u, response):
  """`sum_k response_k u_{t-k}`: u [b, t, d] and response [t, d or 1, o] to [b, t, d, o], by FFT."""
  t = u.shape[1]
  length = scipy.fft.next_fast_len(2 * t - 1, real=True)
  spectrum = (
    jnp.fft.rfft(u, length, axis=1)[..., None] * jnp.fft.rfft(response, length, axis=0)[None]
  )
  return jnp.fft.irfft(spectrum, length, axis=1)[:, :t]


def convolve_summed(u, response):
  """As `convolve`, summed over d: response [t, d, o], result [b, t, o]."""
  t = u.shape[1]
  length = scipy.fft.next_fast_len(2 * t - 1, real=True)
  spectrum = einsum(
    "bfd,fdo->bfo", jnp.fft.rfft(u, length, axis=1), jnp.fft.rfft(response, length, axis=0)
  )
  return jnp.fft.irfft(spectrum, length, axis=1)[:, :t]


def multiply_summed(u, response):
  """`convolve_summed` by a product of matrices."""
  shifted = _shifted(u.swapaxes(1, 2)[:, None], None)[:, 0]
  return einsum("bdik,kdo->bio", shifted, response[::-1])


def last(u, tables: Tables, total):
  """The memory after `total` tokens, from none before them: [b, d, n]."""
  t = u.shape[1]
  if total is not None:  # the last real token comes last
    index = jnp.arange(t)[None] - (t - total)[:, None]
    u = jnp.where(index[..., None] < 0, 0, jnp.take_along_axis(u, index[..., None] % t, axis=1))
  return einsum("bkd,ko->bdo", u, tables.impulse_response(t)[::-1])
