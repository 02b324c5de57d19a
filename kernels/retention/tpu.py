"""Chunkwise retention on TPUs: what surrounds the kernels.

A row is read in blocks of chunks, its heads beside each other as they are in `[b, t, h k]`, and the
state stays on chip from block to block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..runs import untouched_if_masked
from . import tpu_kernels, tpu_plan
from .chunks import in_chunks, primals, written_out
from .tpu_kernels import CHUNK, Block, Weights

SIZES = 64, 512  # of keys and values: smaller ones are mostly filled up, larger states do not fit


def unsupported_reason(q, k, v, state) -> str | None:
  """Why these arrays cannot go through the kernels, or `None`."""
  dtypes = {str(a.dtype) for a in (q, k, v)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    return f"q, k and v are {', '.join(sorted(dtypes))}, expected all bfloat16 or all float32"
  if state is not None and state.dtype == jnp.float64:
    return "the state is float64, expected float32"
  if q.shape[1] < CHUNK:
    return f"there are {q.shape[1]} tokens, expected at least {CHUNK}, a chunk"
  smallest, largest = SIZES
  if not all(smallest <= a.shape[-1] <= largest for a in (q, v)):
    sizes = f"{q.shape[-1]} and {v.shape[-1]}"
    return f"keys and values have size {sizes}, expected {smallest} to {largest}"
  return None


def chunkwise(q, k, v, log_decay, state, reset, mask, *, interpret=False, chunks=None):
  """As in `.xla`, in chunks of 128. A grid step takes `chunks` of them, or what the plan says."""
  t, key_size, value_size = q.shape[1], q.shape[-1], v.shape[-1]
  q, k, v, rate, exponent, segment, state, mask = in_chunks(
    CHUNK, q, k, v, log_decay, state, reset, mask
  )
  exponent, segment = _row(exponent), _row(segment)
  before = jnp.pad(state, [(0, 0), (0, 0), (0, -key_size % CHUNK), (0, -value_size % CHUNK)])
  heads = _beside(q), _beside(k), _beside(v)
  o, after = _chunkwise(*heads, rate, exponent, segment, before, interpret, chunks)
  o = o.reshape(*q.shape[:3], -1)[:, :t, :, :value_size]
  after = after[:, :, :key_size, :value_size]
  return o, untouched_if_masked(after, state, mask)


def _row(a):
  """[b, n c, h] to [b, h, 1, n c]."""
  return None if a is None else a.swapaxes(1, 2)[:, :, None]


def _beside(a):
  """[b, t, h, size] to [b, t, h n c]: whole registers to a head, zeros in what they have more."""
  a = jnp.pad(a, [(0, 0), (0, 0), (0, 0), (0, -a.shape[-1] % CHUNK)])
  return a.reshape(*a.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _chunkwise(q, k, v, rate, exponent, segment, state, interpret, chunks):
  """Of q, k and v `[b, n c, heads size]`, exponent and segment `[b, 1 or h, 1, n c]`.

  Either the rate is there, `[h]`, or every head has exponents of its own.
  """
  o, after, _ = _forward(q, k, v, rate, exponent, segment, state, interpret, chunks, save=False)
  return o, after


def _chunkwise_forward(*args):
  arrays, wanted = primals(*args[:7])
  o, after, starts = _forward(*arrays, *args[7:], save=True)
  return (o, after), (*arrays[:6], starts, wanted)


def _forward(q, k, v, rate, exponent, segment, state, interpret, chunks, *, save):
  n, packed = q.shape[1] // CHUNK, exponent is not None or segment is not None
  of = "backward" if save else "forward"
  key = tpu_plan.make_key(of, q.dtype, packed, *state.shape[2:], n)
  at = _Placement(q, k, state.shape, tpu_plan.choose(chunks, n, key))
  starts = jax.ShapeDtypeStruct((*at.grid, *at.matrix), q.dtype)
  o = jax.ShapeDtypeStruct((at.b, at.t, at.h * at.matrix[1]), v.dtype)
  return at.call(
    tpu_kernels.forward,
    (rate, exponent, segment),
    [(q, at.heads), (k, at.shared), (v, at.shared), (state, at.state)],
    [(o, at.heads), (state, at.state), (starts, at.start) if save else None],
    scratch=[
      (at.matrix, jnp.float32),
      ((at.chunks, CHUNK, CHUNK), v.dtype),
      ((at.chunks, CHUNK, at.matrix[0]), k.dtype),
    ],
    products=2,
    interpret=interpret,
  )


def _chunkwise_backward(interpret, _, residuals, cotangents):
  q, k, v, rate, exponent, segment, starts, wanted = residuals
  d_o, d_after = written_out(cotangents)
  chunks = q.shape[1] // (starts.shape[2] * CHUNK)
  at = _Placement(q, k, d_after.shape, chunks, reverse=True)
  of_rate = of_exponent = None
  if wanted.decays and rate is None:
    of_exponent = (exponent, at.row)
  elif wanted.decays:
    of_rate = (jax.ShapeDtypeStruct((at.b, at.h, 1, CHUNK), jnp.float32), at.state)
  # Query heads that share a key/value head have gradients of their own, which are added.
  d_k, d_v = (
    jax.ShapeDtypeStruct((at.b, at.t, at.h * size), a.dtype if at.alone else jnp.float32)
    for a, size in zip((k, v), at.matrix, strict=True)
  )
  d_q, d_k, d_v, d_state, d_rate, d_exponent = at.call(
    tpu_kernels.backward,
    (rate, exponent, segment),
    [
      *((q, at.heads), (k, at.shared), (v, at.shared), (d_o, at.heads)),
      *((starts, at.start), (d_after, at.state)),
    ],
    [
      *((q, at.heads), (d_k, at.heads), (d_v, at.heads), (d_after, at.state)),
      *(of_rate, of_exponent),
    ],
    scratch=[
      ((at.chunks, *at.matrix), q.dtype),
      (at.matrix, jnp.float32),
      (at.matrix, jnp.float32),
    ],
    products=5,
    interpret=interpret,
  )
  d_rate = None if d_rate is None else d_rate.sum(axis=(0, 2, 3))
  return d_q, at.add(d_k, k), at.add(d_v, v), d_rate, d_exponent, None, d_state


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward, symbolic_zeros=True)


class _Placement:
  """The grid, a step of which takes `chunks` chunks of a head, and its blocks of arrays."""

  def __init__(self, q, k, state_shape, chunks, *, reverse=False):
    self.b, self.h, *self.matrix = state_shape
    self.t = q.shape[1]
    if any(size % CHUNK for size in (self.t, *self.matrix)):
      sizes = "{} tokens, keys of {} and values of {}".format(self.t, *self.matrix)
      raise ValueError(f"{sizes}: expected multiples of {CHUNK}, the lanes of a register")
    self.chunks = chunks
    steps = self.t // (chunks * CHUNK)
    self.grid = (self.b, self.h, steps)
    self._per_kv_head = self.h * self.matrix[0] // k.shape[2]
    self._step = (lambda n: steps - 1 - n) if reverse else lambda n: n

  @property
  def alone(self) -> bool:
    return self._per_kv_head == 1

  def add(self, d, a):
    """Gradients by query head, added up for the key/value heads of `a`."""
    if self.alone:
      return d
    size = d.shape[2] // self.h
    return (
      d.reshape(self.b, self.t, -1, self._per_kv_head, size)
      .sum(axis=3)
      .reshape(a.shape)
      .astype(a.dtype)
    )

  def heads(self, a):
    size = a.shape[2] // self.h
    return pl.BlockSpec((1, self.chunks * CHUNK, size), lambda b, h, n: (b, self._step(n), h))

  def shared(self, a):
    """One key/value head for several of queries."""
    size = a.shape[2] * self._per_kv_head // self.h
    return pl.BlockSpec(
      (1, self.chunks * CHUNK, size),
      lambda b, h, n: (b, self._step(n), jax.lax.div(h, self._per_kv_head)),
    )

  def row(self, a):
    """A number per token."""
    own = a.shape[1] > 1
    return pl.BlockSpec(
      (1, 1, 1, self.chunks * CHUNK), lambda b, h, n: (b, h if own else 0, 0, self._step(n))
    )

  def state(self, a):
    return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, h, n: (b, h, 0, 0))

  def start(self, a):
    """A state per grid step."""
    return pl.BlockSpec((1, 1, 1, *a.shape[3:]), lambda b, h, n: (b, h, self._step(n), 0, 0))

  def call(self, body, decays, inputs, outputs, *, scratch, products, interpret):
    """Runs `body` on arrays, each of which comes with the method that places it.

    `products`: how many [c, k] by [k, v] matrices it multiplies in a chunk, and nearly as many of
    [c, c] by [c, k or v].
    """
    rate, *rows = decays
    arrays = [a for a, _ in inputs]
    shapes = [None if output is None else output[0] for output in outputs]
    key_size, value_size = self.matrix
    macs = products * CHUNK * (key_size * value_size + CHUNK * (key_size + value_size) // 2)
    cost = pl.CostEstimate(
      flops=2 * macs * self.b * self.h * self.t // CHUNK,
      transcendentals=self.b * self.h * self.t * CHUNK,
      bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((arrays, shapes))),
    )
    weights = Weights((CHUNK, CHUNK), (CHUNK, CHUNK), (CHUNK, CHUNK), (1, CHUNK))
    scratch = [(shape, jnp.dtype(dtype)) for shape, dtype in scratch]
    placed = [(a, self.row) for a in rows if a is not None] + inputs
    placed += [output for output in outputs if output is not None]
    blocks = [(place(a).block_shape, a.dtype) for a, place in placed]
    scratches = [*scratch, *((shape, jnp.dtype(jnp.float32)) for shape in weights)]
    tpu_plan.check_memory(self.chunks, blocks, scratches)
    return pl.pallas_call(
      functools.partial(_kernel, body),
      grid=self.grid,
      in_specs=[
        None if rate is None else pl.BlockSpec(memory_space=pltpu.SMEM),
        *(None if a is None else self.row(a) for a in rows),
        [place(a) for a, place in inputs],
      ],
      out_specs=[None if output is None else output[1](output[0]) for output in outputs],
      out_shape=[a if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in shapes],
      scratch_shapes=[
        [pltpu.VMEM(shape, jnp.float32) for shape in weights],
        [pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tpu_plan.VMEM
      ),
      cost_estimate=cost,
      name=f"retention_{body.__name__}",
      interpret=interpret,
    )(rate, *rows, arrays)


def _kernel(body, rate, exponent, segment, inputs, *rest):
  *outputs, weights, scratch = rest
  rate = 1.0 if rate is None else rate[pl.program_id(1)]
  block = Block(rate, exponent, segment, Weights(*weights))
  body(block, *inputs, *outputs, *scratch)
