"""Retention on GPUs: one kernel that sweeps over a sequence, chunk by chunk.

With weights as in `..runs` (chunk-local `A_i`, document `s_i`), a sweep computes

    o_i = (sum_j W_ij (q_i . k_j) v_j) + read_i q_i S        S' = keep S + sum_j add_j k_j v_j^T

forward in time, `W_ij = exp(A_i - A_j)` for `j <= i`, or backward, with `W` transposed and `read`
and `add` exchanged. The forward pass of retention is a sweep forward, and each gradient is a sweep
too (see `.gpu`). This one is of Mosaic GPU, in bfloat16; for float32 there is `.gpu_triton`.

A thread block owns a row, a head and a tile of columns of `v`, and S never leaves it: *keepers*
(warpgroups) hold it in float32 registers and hand a bfloat16 copy through shared memory to the
*readers*, which compute outputs of alternating chunks; the last warpgroup loads tiles. Nothing is
written to global memory per chunk but `o`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..runs import states_before
from . import gpu_kernel, gpu_triton
from .gpu_plan import CHUNK, MULTIPROCESSORS, check_pieces, make_plan, measured

LOG2E = math.log2(math.e)
UNROLL = 8  # pieces that are joined in one launch: a loop has three for each


def sweep(
  q: jax.Array,  # [b, t, hq, k], where hq, hk and hv divide h
  k: jax.Array,  # [b, t, hk, k]
  v: jax.Array,  # [b, t, hv, v]
  rate: jax.Array,  # f32[h]
  exponent: jax.Array | None,  # f32[b, t] or f32[b, h, t]
  segment: jax.Array | None,  # int32[b, t]
  state: jax.Array,  # f32[b, h, k, v]
  *,
  reverse: bool = False,
  out_dtype=None,
  interpret=None,
  tile: int | None = None,
  pieces: int | None = None,
) -> tuple[jax.Array, jax.Array]:  # [b, t, h, v], f32[b, h, k, v]
  """The sweep of this module, backward in time if `reverse`.

  Where rows and heads do not fill the chip, a sequence is cut into pieces: one sweep finds what
  each adds to the state, hence the states that enter them, and another does all pieces at once.
  `tile` columns of v and `pieces` are what was measured (see `.tuned`), else a heuristic's.
  """
  (b, t), (h, k_size, v_size) = q.shape[:2], state.shape[1:]
  out_dtype = jnp.dtype(out_dtype or v.dtype)
  rate = rate.astype(jnp.float32)
  if exponent is not None and exponent.ndim == 3:
    rate = jnp.ones_like(rate)
  options = {"reverse": reverse, "interpret": interpret}
  if tile is None and pieces is None and v.dtype == jnp.bfloat16:
    choice = measured(b * h, t, k_size, v_size, out_dtype, reverse)
    tile, pieces = choice.get("tile"), choice.get("pieces")
  pieces = _pieces(b * h * v_size // 64, t // CHUNK) if pieces is None else pieces
  check_pieces(pieces, t)
  if pieces == 1:
    plan = make_plan(b * h, k_size, v_size, out_dtype.itemsize, tile)
    return _sweep(plan, q, k, v, rate, exponent, segment, state, out_dtype, **options)

  def cut(a):  # in rows
    return None if a is None else a.reshape(b * pieces, t // pieces, *a.shape[2:])

  q, k, v, segment = map(cut, (q, k, v, segment))
  if exponent is not None and exponent.ndim == 3:
    exponent = exponent.reshape(b, h, pieces, -1).swapaxes(1, 2).reshape(b * pieces, h, -1)
  else:
    exponent = cut(exponent)
  arrays = (q, k, v, rate, exponent, segment)
  plan = make_plan(b * pieces * h, k_size, v_size, 0)
  zeros = jnp.zeros((b * pieces, *state.shape[1:]), jnp.float32)
  (added,) = _sweep(plan, *arrays, zeros, None, **options)

  def by_piece(a):  # of rows
    return a.reshape(b, pieces, *a.shape[1:]).swapaxes(0, 1)

  kept = jnp.broadcast_to(_kept(rate, exponent, segment, t // pieces), (b * pieces, h))
  kept = by_piece(kept)[..., None, None]
  final, entering = states_before(state, kept, by_piece(added), reverse=reverse, unroll=UNROLL)
  entering = entering.swapaxes(0, 1).reshape(zeros.shape)
  plan = make_plan(b * pieces * h, k_size, v_size, out_dtype.itemsize, tile)
  out, _ = _sweep(plan, *arrays, entering, out_dtype, **options)
  return out.reshape(b, t, h, v_size), final


def _pieces(blocks: int, chunks: int) -> int:
  """How many pieces of at least 8 chunks a sequence is cut into, for all to run at once."""
  pieces = 1
  while 2 * pieces * blocks <= MULTIPROCESSORS and chunks % (16 * pieces) == 0:
    pieces *= 2
  return pieces


def _kept(rate, exponent, segment, t):
  """The weight of the state before a row of `t` tokens in the state after it, [b, h] or [1, h]."""
  if exponent is None:
    total = (rate * t)[None]
  elif exponent.ndim == 2:
    total = rate * exponent[:, CHUNK - 1 :: CHUNK].sum(axis=1, keepdims=True)
  else:
    total = exponent[:, :, CHUNK - 1 :: CHUNK].sum(axis=2)
  if segment is not None:
    total = jnp.where((segment > 0).any(axis=1, keepdims=True), -jnp.inf, total)
  return jnp.exp(total)


def _sweep(plan, q, k, v, rate, exponent, segment, state, out_dtype, *, reverse, interpret):
  """One launch. Without `out_dtype`, only the state after the sweep."""
  if v.dtype == jnp.float32:  # `wgmma` would round it
    arrays = (q, k, v, rate, exponent, segment, state)
    return gpu_triton.launch(*arrays, out_dtype, reverse=reverse, interpret=interpret)
  (b, t), h, v_size = q.shape[:2], state.shape[1], v.shape[-1]
  inputs = {"k": k, "v": v, "rate": rate * jnp.float32(LOG2E), "state": state}
  outputs = {"final": jax.ShapeDtypeStruct(state.shape, jnp.float32)}
  if out_dtype is not None:
    inputs["q"] = q
    outputs["out"] = jax.ShapeDtypeStruct((b, t, h, v_size), out_dtype)
  if exponent is not None:
    inputs["exponent"] = exponent
  if segment is not None:
    inputs["segment"] = segment
    last = segment.reshape(b, t // CHUNK, CHUNK).max(axis=-1)
    inputs["last"] = jnp.maximum(last, 0)
  names = (*inputs, *reversed(outputs))  # the outputs as they are returned
  kernel = pl.kernel(
    functools.partial(gpu_kernel.entry, plan=plan, names=names, reverse=reverse),
    out_type=tuple(outputs[name] for name in reversed(outputs)),
    mesh=plgpu.Mesh(
      grid=(b * h * (v_size // plan.tile),),
      grid_names=("block",),
      num_threads=plan.readers + plan.keepers + 1,
      thread_name="warpgroup",
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    cost_estimate=_cost(plan, t, state, (*inputs.values(), *outputs.values())),
    name="retention_" + ("sweep" if plan.readers else "states") + "_back" * reverse,
    interpret=False if interpret is None else interpret,
  )
  return kernel(*inputs.values())


def _cost(plan, t, state, arrays):
  b, h, k_size, v_size = state.shape
  tiles = v_size // plan.tile
  per_token = 2 * k_size * v_size
  if plan.readers:
    per_token += 2 * CHUNK * (tiles * k_size + v_size) + 2 * k_size * v_size
  return pl.CostEstimate(
    flops=b * h * t * per_token,
    transcendentals=b * h * t * tiles * ((CHUNK + 1) * bool(plan.readers) + 1),
    bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
  )
