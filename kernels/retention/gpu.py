"""Chunkwise retention on GPUs: the forward pass and each gradient are sweeps of one kernel.

With `dS` the gradient of the state that leaves a chunk and weights as in `.gpu_sweep`,

    dq_i = sum_{j <= i} W_ij (do_i . v_j) k_j + read_i S do_i         forward, over (do, v, k)
    dk_j = sum_{i >= j} W_ij (do_i . v_j) q_i + add_j dS v_j          backward, over (v, do, q)
    dv_j = sum_{i >= j} W_ij (q_i . k_j) do_i + add_j dS^T k_j        backward, over (k, q, do)

The first is retention of a state `S^T`; the last two are retention in reverse, whose states are
`dS^T` and `dS`. So nothing per chunk is ever in global memory, where a pass that shared `dS` among
the three would read as many bytes of saved states as are saved, and fill half as many processors.
"""

import functools

import jax
import jax.numpy as jnp

from ..runs import untouched_if_masked
from .chunks import in_chunks, primals, written_out
from .gpu_plan import CHUNK, SIZES
from .gpu_sweep import sweep


def unsupported_reason(q, k, v, state) -> str | None:
  """Why these arrays cannot go through the kernel, or `None`."""
  dtypes = {str(a.dtype) for a in (q, k, v)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"q, k and v are {', '.join(sorted(dtypes))}, expected all bfloat16 or all float32"
  if state is not None and state.dtype == jnp.float64:
    return "the state is float64, expected float32"
  if max(q.shape[-1], v.shape[-1]) > SIZES[-1]:
    sizes = f"{q.shape[-1]} and {v.shape[-1]}"
    return f"keys and values have size {sizes}, expected at most {SIZES[-1]}"
  b, t, h, size = q.shape
  # Counted in 32 bits: elements of the state, hence thread blocks, and rows `[b t h]` of the arrays
  # that tiles are copied from and to. Elements of q, k and v are not.
  state_size, rows = b * h * _size(size) * _size(v.shape[-1]), b * h * (t + -t % CHUNK)
  if state_size >= 2**31:
    return f"the state has {state_size} elements, expected fewer than 2^31"
  if rows >= 2**31:
    return f"there are {rows} vectors of queries, expected fewer than 2^31"
  return None


def chunkwise(q, k, v, log_decay, state, reset, mask, *, interpret=None):
  """As in `.xla`, in chunks of 64."""
  t, key_size, value_size = q.shape[1], q.shape[-1], v.shape[-1]
  q, k, v, rate, exponent, segment, state, mask = in_chunks(
    CHUNK, q, k, v, log_decay, state, reset, mask
  )
  if rate is None:
    rate, exponent = jnp.ones(q.shape[2]), exponent.swapaxes(1, 2)
  elif exponent is not None:
    exponent = exponent[..., 0]
  segment = None if segment is None else segment[..., 0]
  q, k, v = (_filled(a, 3) for a in (q, k, v))
  before = _filled(_filled(state, 2), 3)
  o, after = _chunkwise(q, k, v, rate, exponent, segment, before, interpret)
  after = after[:, :, :key_size, :value_size]
  return o[:, :t, :, :value_size], untouched_if_masked(after, state, mask)


def _size(size: int) -> int:
  return next(one for one in SIZES if one >= size)


def _filled(a, axis):
  """Zeros behind the numbers of a head: they change nothing."""
  missing = _size(a.shape[axis]) - a.shape[axis]
  return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _chunkwise(q, k, v, rate, exponent, segment, state, interpret):
  """Of whole chunks; exponent `[b, t]`, times the rate, or `[b, h, t]`; segment `[b, t]`."""
  return sweep(q, k, v, rate, exponent, _whole(segment), state, interpret=interpret)


def _whole(segment):
  return None if segment is None else segment.astype(jnp.int32)


def _chunkwise_forward(*args):
  arrays, wanted = primals(*args[:7])
  return _chunkwise(*arrays, args[7]), (arrays, wanted)


def _chunkwise_backward(interpret, residuals, cotangents):
  (q, k, v, rate, exponent, segment, state), wanted = residuals
  d_o, d_after = written_out(cotangents)
  d_o = d_o.astype(v.dtype)
  weights = (rate, exponent, _whole(segment))
  backward = functools.partial(sweep, reverse=True, interpret=interpret)
  # The gradient of decays is a small difference of these.
  precise = {"out_dtype": jnp.float32 if wanted.decays else None}
  transposed = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
  d_q, after = sweep(d_o, v, k, *weights, transposed(state), interpret=interpret, **precise)
  d_k, _ = backward(v, d_o, q, *weights, transposed(d_after), **precise)
  d_v, d_state = backward(k, q, d_o, *weights, d_after)
  d_rate = d_exponent = None
  if wanted.decays:
    through_after = jnp.einsum("bhkv,bhvk->bh", d_after, after)
    d_sums = _gradient_of_sums(q, k, d_q, d_k, through_after)
    d_rate, d_exponent = _of_rate(d_sums, rate, exponent)
  d_k, d_v = (
    d.reshape(*a.shape[:3], -1, a.shape[3]).sum(axis=3, dtype=jnp.float32)
    for d, a in ((d_k, k), (d_v, v))
  )
  return (
    *(d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)),
    *(d_rate, d_exponent, None, d_state),
  )


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward, symbolic_zeros=True)


def _gradient_of_sums(q, k, d_q, d_k, through_after):
  """That of `A`, [b, t, h]: `q_i . dq_i - k_i . dk_i`, and `<dS, S>` at the last of a chunk.

  The latter is what crosses the boundary after the chunk: of the sum over all later tokens, pairs
  of these cancel, and what is left is what they take from before, less what they give to the end.
  """
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  taken = (q.astype(d_q.dtype) * d_q).sum(-1) - (k.astype(d_k.dtype) * d_k).sum(-1)
  b, t, h = taken.shape
  taken = taken.reshape(b, t // CHUNK, CHUNK, h)
  chunks = taken.sum(axis=2)
  later = jnp.flip(jnp.cumsum(jnp.flip(chunks, axis=1), axis=1), axis=1) - chunks
  crossing = later + through_after[:, None]
  return taken.at[:, :, -1].add(crossing).reshape(b, t, h)


def _of_rate(d_sums, rate, exponent):
  """Gradients of the rate, and of the exponents if every head has its own."""
  if exponent is not None and exponent.ndim == 3:
    return jnp.zeros_like(rate), d_sums.swapaxes(1, 2)
  if exponent is None:
    exponent = (jnp.arange(d_sums.shape[1]) % CHUNK + 1.0)[None]
    return jnp.einsum("bth,t->h", d_sums, exponent[0]), None
  return jnp.einsum("bth,bt->h", d_sums, exponent), jnp.zeros_like(exponent)
