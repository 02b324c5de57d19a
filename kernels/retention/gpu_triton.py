"""The sweep of `.gpu_sweep` in float32: one Pallas-Triton kernel, for more GPUs than Hopper's.

A program owns a row, a head and a tile of columns of `v`, and S never leaves its registers, in
blocks of keys. Products are of float32 numbers, hence not on tensor cores: `wgmma` and `mma` would
round what they multiply to ten bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .gpu_plan import CHUNK

ROWS = 32  # tokens at a time: fewer have fewer products of pairs, more use a number more often
BLOCK = 16  # keys in a product: all of its operands are in registers at once
WARPS = 8
STAGES = 2  # chunks in flight


def tile_of(k_size: int) -> int:
  """Columns of `v` that a program owns: as many as leave registers for the products."""
  return 64 if k_size <= 256 else 32


def launch(q, k, v, rate, exponent, segment, state, out_dtype, *, reverse, interpret):
  """Arguments as of `.gpu_sweep.sweep`. Without `out_dtype`, only the state after the sweep."""
  (b, t), (h, k_size, v_size) = v.shape[:2], state.shape[1:]
  tile = tile_of(k_size)
  tiles = v_size // tile

  def place(*axes):
    """The block of an array that a program has; a number is that of heads, shared by several."""

    def index(program):
      # Tiles of one head are neighbours, so that they find q and k in the L2 cache.
      head, column = lax.div(program, tiles), lax.rem(program, tiles)
      row, head = lax.div(head, h), lax.rem(head, h)
      at = {"row": row, "column": column, "all": 0}
      return tuple(at[a] if isinstance(a, str) else lax.div(head, h // a) for a in axes)

    return index

  def tokens(heads, width, columns):
    return pl.BlockSpec((None, t, None, width), place("row", "all", heads, columns))

  def stream(a):  # [b, t] or [b, h, t]
    if a.ndim == 2:
      return pl.BlockSpec((None, t), place("row", "all"))
    return pl.BlockSpec((None, None, t), place("row", h, "all"))

  states = pl.BlockSpec((None, None, k_size, tile), place("row", h, "all", "column"))
  inputs = {
    "k": (k, tokens(k.shape[2], k_size, "all")),
    "v": (v, tokens(v.shape[2], tile, "column")),
    "rate": (rate, pl.BlockSpec((1,), place(h))),
    "state": (state, states),
  }
  outputs = {"final": (jax.ShapeDtypeStruct(state.shape, jnp.float32), states)}
  if out_dtype is not None:
    inputs["q"] = (q, tokens(q.shape[2], k_size, "all"))
    out = jax.ShapeDtypeStruct((b, t, h, v_size), out_dtype)
    outputs = {"out": (out, tokens(h, tile, "column")), **outputs}
  streams = {"exponent": exponent, "segment": segment}
  inputs |= {name: (_halved(a), stream(a)) for name, a in streams.items() if a is not None}
  arrays, in_specs = zip(*inputs.values(), strict=True)
  out_shape, out_specs = zip(*outputs.values(), strict=True)
  return pl.pallas_call(
    functools.partial(retention_sweep, names=(*inputs, *outputs), reverse=reverse),
    grid=(b * h * tiles,),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    cost_estimate=_cost(t, state, out_dtype is not None, (*arrays, *out_shape)),
    interpret=False if interpret is None else interpret,
  )(*arrays)


def _halved(sums):
  """Sums within chunks of `CHUNK` tokens, [..., t], as sums within chunks of `ROWS`."""
  parts = sums.reshape(*sums.shape[:-1], -1, CHUNK // ROWS, ROWS)
  before = jnp.pad(parts[..., :-1, -1:], [(0, 0)] * (parts.ndim - 2) + [(1, 0), (0, 0)])
  return (parts - before).reshape(sums.shape)


def _cost(t, state, read, arrays):
  b, h, k_size, v_size = state.shape
  tiles = v_size // tile_of(k_size)
  per_token = 2 * k_size * v_size
  if read:
    per_token += 2 * ROWS * (tiles * k_size + v_size) + 2 * k_size * v_size
  return pl.CostEstimate(
    flops=b * h * t * per_token,
    transcendentals=b * h * t * tiles * (ROWS * read + 2),
    bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
  )


def retention_sweep(*refs, names, reverse):
  """What a program does; without `out`, only the states."""
  ref = dict(zip(names, refs, strict=True))
  t, k_size = ref["k"].shape
  chunks = t // ROWS
  rate = ref["rate"][0]
  blocks = [pl.ds(start, BLOCK) for start in range(0, k_size, BLOCK)]

  def chunk(n, state):
    start = ROWS * (chunks - 1 - n if reverse else n)
    tokens, last = pl.ds(start, ROWS), start + ROWS - 1
    exponent, final = 1.0 + jnp.arange(ROWS), float(ROWS)
    if "exponent" in ref:
      exponent, final = ref["exponent"][tokens], ref["exponent"][last]
    exponent, final = rate * exponent, rate * final
    # Of the state before in a token, and of a token in the state after; at `last` if unbroken.
    head, tail, keep = exponent, final - exponent, final
    segment = None
    if "segment" in ref:
      segment, last_segment = ref["segment"][tokens], ref["segment"][last]
      head = jnp.where(segment == 0, head, -jnp.inf)
      tail = jnp.where(segment == last_segment, tail, -jnp.inf)
    read, add = (tail, head) if reverse else (head, tail)
    v = ref["v"][tokens, :]
    added = jnp.exp(add)[:, None] * v
    scores = history = 0.0
    new = []
    for block, part in zip(blocks, state, strict=True):
      k = ref["k"][tokens, block]
      if "out" in ref:
        q = ref["q"][tokens, block]
        scores += _product(q, k, 1, 1)
        history += _product(q, part, 1, 0)
      kept = jnp.exp(keep) * part
      if segment is not None:
        kept = jnp.where(last_segment == 0, kept, 0.0)
      new.append(kept + _product(k, added, 0, 0))
    if "out" in ref:
      read = jnp.exp(read)[:, None]
      out = read * history
      if segment is not None:  # 0 where the weight is, whatever the state holds
        out = jnp.where(read == 0, 0.0, out)
      out += _product(scores * _pairs(exponent, segment, reverse), v, 1, 0)
      ref["out"][tokens, :] = out.astype(ref["out"].dtype)
    return tuple(new)

  state = tuple(ref["state"][block, :] for block in blocks)
  state = lax.fori_loop(0, chunks, chunk, state)
  for block, part in zip(blocks, state, strict=True):
    ref["final"][block, :] = part


def _pairs(exponent, segment, reverse):
  """`W`, [c, c]."""
  rows, columns = (lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis) for axis in (0, 1))
  visible = rows <= columns if reverse else rows >= columns
  difference = exponent[:, None] - exponent[None, :]
  if segment is not None:
    visible &= segment[:, None] == segment[None, :]
  return jnp.exp(jnp.where(visible, -difference if reverse else difference, -jnp.inf))


def _product(a, b, a_axis, b_axis):
  """The sum over an axis of each, with nothing rounded before it is multiplied."""
  return lax.dot_general(
    *(a, b, (((a_axis,), (b_axis,)), ((), ()))),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
