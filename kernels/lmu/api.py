"""The public function: validation, then the form asked for, by the method that is fastest."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ..checks import Form, check_form, check_shapes
from . import xla
from .tables import Tables

Discretizer = Literal["zoh", "euler"]
DISCRETIZERS: tuple[Discretizer, ...] = get_args(Discretizer)
Method = Literal["gemm", "fft"]
METHODS: tuple[Method, ...] = get_args(Method)

FFT_FROM = {"cpu": 256}  # tokens from which the parallel form is an FFT, by platform
FFT_FROM_ELSEWHERE = 2048


@jax.named_scope("mixing")
def lmu(
  u: jax.Array,  # [b, t, d]
  *,
  order: int,
  theta: float | jax.Array,  # a number, or [] to be differentiated by
  discretizer: Discretizer = "zoh",
  kernel: jax.Array | None = None,  # [d, n, o]
  state: jax.Array | None = None,  # [b, d, n]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
  form: Form = "chunkwise",
  method: Method | None = None,
  chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:  # [b, t, d, n] or [b, t, o], [b, d, n]
  """The Legendre memory of every channel (Voelker et al., NeurIPS 2019; section 2).

      m_t = Abar m_{t-1} + Bbar u_t          u(t - r theta) ~ sum_i P_i(2r - 1) m_ti,  0 <= r <= 1

  `m` are the coefficients of the last `theta` inputs in shifted Legendre polynomials; see `tables`
  for `Abar` and `Bbar`. The parallel form is a convolution with the impulse response (Chilkuri and
  Eliasmith, ICML 2021), by FFT or as a product of matrices. Where documents begin and it would be
  an FFT, or it would be a product and goes on from a state, it is the chunkwise form. That is
  products within chunks and powers of `Abar` between them; the recurrent form takes one token
  after another.

  Args:
    u: inputs, one number for each channel.
    order: coefficients n of a channel.
    theta: length of the window in tokens. An array has a gradient.
    discretizer: `"zoh"`, exact for inputs that are held for a token, or `"euler"`, which needs
      `theta` above about 4 n.
    kernel: what reads the memory: with it `o_t = sum_d kernel_d^T m_td` is returned instead. In the
      parallel form from no state it is folded into the impulse response where that is less work,
      so that the memory is never made.
    state: the memory before the first token; zeros if `None`.
    reset: true at the first token of a document; the memory is cleared before that token, whatever
      it holds (NaN included).
    mask: false at padding, which leaves the memory bit for bit as it was and is invisible to real
      tokens (its own `reset` included), whatever it holds. The output there is finite and
      unspecified.
    form: which algorithm.
    method: of the parallel form, `"gemm"` or `"fft"`; `None` chooses by length and platform. By
      FFT, outputs before a token depend on it by rounding (1e-7 of the largest input).
    chunk_size: tokens in a chunk; the recurrent form ignores it.

  Returns:
    The memory of every token, or what is read of it, and the final memory. They are held in the
    widest of float32 and the dtypes of u and state; what is read has the dtype of `kernel`.
    Everything is differentiable.

  Raises:
    ValueError: for shapes that do not fit together, or an unknown form, method or discretizer.
  """
  u, kernel, state, reset, mask = jax.tree.map(jnp.asarray, (u, kernel, state, reset, mask))
  if jnp.ndim(u) != 3:
    raise ValueError(f"u has shape {list(jnp.shape(u))}, expected [batch, time, channels]")
  b, t, d = u.shape
  if order < 1:
    raise ValueError(f"order is {order}, expected at least 1")
  if discretizer not in DISCRETIZERS:
    raise ValueError(f"discretizer is {discretizer!r}, expected one of {', '.join(DISCRETIZERS)}")
  if method is not None and method not in METHODS:
    raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)} or None")
  learned = isinstance(theta, jax.Array)
  if not learned and not 0 < theta < math.inf:
    raise ValueError(f"theta is {theta}, expected a positive number of tokens")
  expected = {
    "theta": (theta, {()}),
    "state": (state, {(b, d, order)}),
    "reset": (reset, {(b, t)}),
    "mask": (mask, {(b, t)}),
    "kernel": (kernel, set() if kernel is None else {(d, order, *kernel.shape[-1:])}),
  }
  check_shapes(f"u {list(u.shape)} and order {order}", expected)
  check_form("lmu", t, form, chunk_size)

  dtype = jnp.result_type(jnp.float32, *(a.dtype for a in (u, state) if a is not None))
  tables = Tables(order, theta if learned else float(theta), discretizer, dtype)
  u, begins, total, back = _compact(u.astype(dtype), reset, mask)
  if state is not None:
    state = state.astype(dtype)
  if form == "parallel":
    y, final = _parallel(u, tables, state, begins, total, kernel, method, chunk_size)
  else:
    if form == "chunkwise":
      y = xla.pieces(u, tables, state, begins, chunk_size)
      final = _at(y, total)
    else:
      before = jnp.zeros((b, d, order), dtype) if state is None else state
      y, final = xla.recurrent(u, tables, before, begins, total)
    y = _read(y, kernel)
  if total is not None:
    untouched = jnp.zeros_like(final) if state is None else state
    final = jnp.where((total == 0)[:, None, None], untouched, final)
    y = jnp.take_along_axis(y, back.reshape(b, t, *[1] * (y.ndim - 2)), axis=1)
  return y, final


def _compact(u, reset, mask):
  """Real tokens first; where documents begin; their number; and where each token went."""
  if mask is None:
    return u, reset, None, None
  order = jnp.argsort(~mask, axis=1, stable=True)
  u = jnp.take_along_axis(jnp.where(mask[..., None], u, 0), order[..., None], axis=1)
  begins = None if reset is None else jnp.take_along_axis(reset & mask, order, axis=1)
  count = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
  return u, begins, count[:, -1], jnp.maximum(count - 1, 0)


def _parallel(u, tables, state, begins, total, kernel, method, chunk_size):
  b, t, _ = u.shape
  method = method or fastest_method(t)
  fold = kernel is not None and folds(b, t, *kernel.shape, method)
  if fold and begins is None and state is None:
    response = jnp.einsum(
      "ko,doh->kdh",
      tables.impulse_response(t),
      kernel.astype(u.dtype),
      precision=jax.lax.Precision.HIGHEST,
    )
    convolve = xla.convolve_summed if method == "fft" else xla.multiply_summed
    return convolve(u, response).astype(kernel.dtype), xla.last(u, tables, total)
  if method == "gemm" and state is None:
    m = xla.pieces(u, tables, None, begins, t)
  elif method == "gemm" or begins is not None:  # all powers up to t would be a large table
    m = xla.pieces(u, tables, state, begins, chunk_size)
  else:
    m = xla.convolve(u, tables.impulse_response(t)[:, None])
    if state is not None:
      m += xla.pieces(jnp.zeros_like(u), tables, state, None, chunk_size)
  return _read(m, kernel), _at(m, total)


def fastest_method(t: int) -> Method:
  """That of the parallel form of `t` tokens, where none is asked for."""
  return "gemm" if t < FFT_FROM.get(jax.default_backend(), FFT_FROM_ELSEWHERE) else "fft"


def folds(b: int, t: int, d: int, n: int, o: int, method: Method) -> bool:
  """Whether it is less work to convolve with what is read of the response than to read after."""
  if method == "gemm":
    folded, apart = t * d * o, t * d * n
  else:
    each = 2.5 * math.log2(2 * t) + 3
    folded, apart = each * o, each * d * n
  return folded + d * n * o / b <= apart + d * n * o


@jax.named_scope("matmul")
def _read(m, kernel):
  if kernel is None:
    return m
  return jnp.einsum("btdn,dno->bto", m.astype(kernel.dtype), kernel)


def _at(m, total):
  """The memory after `total` tokens, that of the last one where all are real."""
  if total is None:
    return m[:, -1]
  return jnp.take_along_axis(m, jnp.maximum(total - 1, 0)[:, None, None, None], axis=1)[:, 0]
