"""Bodies of the TPU kernels: a grid step takes a block of some chunks of one head of one row.

In a chunk, `A_i` is the running sum of log decays, its own included, and `s_i` counts the documents
begun. The weights of `..runs` are then, of the scores, the state before and the state after,

    pairs_ij = exp(A_i - A_j) where j <= i and s_i = s_j      read_i = exp(A_i) where s_i = 0
    leave_j = exp(A_last - A_j) where s_j = s_last            kept = exp(A_last) where s_last = 0

and 0 elsewhere. A weight per token lies in all lanes of `[c, c]`, ready to scale a matrix: a chunk
has as many tokens as a register has lanes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

CHUNK = 128
VALUES = 256  # columns of values at a time, backward: sums are used before registers run out


class Weights(NamedTuple):
  """Arrays, or the references they are in."""

  pairs: Any  # [c, c]
  read: Any  # [c, c], the same in all lanes
  leave: Any  # [c, c], the same in all lanes
  kept: Any  # [1, c], the same in all lanes

  def loaded(self) -> "Weights":
    """Arrays: read once for all that use them."""
    return Weights(*(weight[...] for weight in self))


class Block(NamedTuple):
  """What the weights of a block's chunks are made of: `A = rate * exponent`."""

  rate: Any  # of the head
  exponent: Any  # Ref[1, 1, 1, tokens]; None: 1, 2, ... in every chunk
  segment: Any  # Ref[1, 1, 1, tokens], documents begun in the chunk; None: 0
  kept: Weights  # scratch for the weights of all chunks of a head where both are None

  def fill(self):
    if self.exponent is None and self.segment is None:
      for ref, weight in zip(self.kept, _weights(self.rate, None, None), strict=True):
        ref[...] = weight

  def weights(self, rows) -> Weights:
    if self.exponent is None and self.segment is None:
      return self.kept
    segment = None if self.segment is None else self.segment[0, 0, :, rows]
    return _weights(self.rate, self._exponent(rows), segment)

  def counts(self, rows) -> tuple[jax.Array, jax.Array]:
    """What the rate is multiplied with, by token of the first axis and of the last: [c, c]."""
    exponent = self._exponent(rows)
    if exponent is None:
      return _numbers(0) + 1, _numbers(1) + 1
    return _column(exponent), jnp.broadcast_to(exponent, (CHUNK, CHUNK))

  def _exponent(self, rows):
    return None if self.exponent is None else self.exponent[0, 0, :, rows]

  def scale_state(self, weight, x):
    """`weight * x`, but 0 where the weight is: a reset forgets a state that is not finite too."""
    scaled = _scale(weight, x)
    return scaled if self.segment is None else jnp.where(_wide(weight, x) == 0, 0, scaled)


def _weights(rate, exponent, segment) -> Weights:
  token, lane = _numbers(0), _numbers(1)
  if exponent is None:
    row, column = rate * (lane + 1), rate * (token + 1)
  else:
    row, column = rate * exponent, rate * _column(exponent)
  last = column[CHUNK - 1 :]
  visible, read, leave, kept = token >= lane, column, last - column, last
  if segment is not None:
    begun = _column(segment)
    ended = begun[CHUNK - 1 :]
    visible &= begun == segment
    read = jnp.where(begun == 0, read, -jnp.inf)
    leave = jnp.where(begun == ended, leave, -jnp.inf)
    kept = jnp.where(ended == 0, kept, -jnp.inf)
  pairs = jnp.where(visible, column - row, -jnp.inf)  # before exp, which could overflow
  return Weights(*map(jnp.exp, (pairs, read, leave, kept)))


def _numbers(axis: int) -> jax.Array:
  """0, 1, ... along an axis of [c, c]."""
  return jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis).astype(jnp.float32)


def _column(row):
  """[1, c] to [c, c], the same in all lanes."""
  return jnp.broadcast_to(row, (CHUNK, CHUNK)).T


def _wide(weight, x):
  return jnp.tile(weight[...], (1, x.shape[1] // CHUNK))


def _scale(weight, x):
  return _wide(weight, x) * x


def _products(dtype):
  """`a b`, `a b^T` and `a^T b`, summed in float32."""
  # The matrix unit takes bfloat16; of float32 it must be asked for all of it.
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

  def product(a, b, over):
    numbers = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(
      a, b, numbers, precision=precision, preferred_element_type=jnp.float32
    )

  return [functools.partial(product, over=over) for over in ((1, 0), (1, 1), (0, 0))]


def _chunks(ref):
  return [(n, pl.ds(n * CHUNK, CHUNK)) for n in range(ref.shape[1] // CHUNK)]


def _columns(ref, width):
  size = ref.shape[-1]
  return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def forward(block: Block, q, k, v, before, o, after, starts, state, scores, leaving):
  """`o = (q k^T * pairs) v + read q S`, then `S = kept S + (leave k)^T v`, chunk by chunk.

  Refs: q, k, v, o `[1, tokens, size]`; before, after `[1, 1, k, v]`; starts, the state at the start
  of the block for the backward pass, or `None`. Scratch: the state; of each chunk the scores, once
  they are weighted, and `leave k`.
  """
  dot, dot_transposed, transposed_dot = _products(q.dtype)

  @pl.when(pl.program_id(2) == 0)
  def _():
    block.fill()
    state[...] = before[0, 0]

  if starts is not None:
    starts[0, 0, 0] = state[...].astype(starts.dtype)
  # So that registers suffice and none is spilled: what needs no state is made for all chunks first,
  # into memory, or the scheduler would hold it beside the sums; these are of [c, c], a quarter of
  # the registers each; and operands are read where they are used.
  for n, rows in _chunks(q):
    weights, keys = block.weights(rows), k[0, rows]
    scores[n] = (dot_transposed(q[0, rows], keys) * weights.pairs[...]).astype(v.dtype)
    leaving[n] = _scale(weights.leave, keys.astype(jnp.float32)).astype(k.dtype)
  for n, rows in _chunks(q):
    weights = block.weights(rows)
    for of_v in _columns(v, CHUNK):
      read = dot(q[0, rows], state[:, of_v].astype(q.dtype))
      read = block.scale_state(weights.read, read)
      o[0, rows, of_v] = (dot(scores[n], v[0, rows, of_v]) + read).astype(o.dtype)
      for of_k in _columns(k, CHUNK):
        s = block.scale_state(weights.kept, state[of_k, of_v])
        state[of_k, of_v] = s + transposed_dot(leaving[n, :, of_k], v[0, rows, of_v])

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    after[0, 0] = state[...]


def backward(
  block: Block, q, k, v, d_o, starts, d_after, d_q, d_k, d_v, d_before, d_rate, d_exponent, *scratch
):
  """The gradients, the last block first; `d_S` is that of the state after a chunk.

      d_q = d_scores k + read d_o S^T      d_scores = (d_o v^T) * pairs
      d_k = d_scores^T q + leave v d_S^T   d_v = scores^T d_o + leave k d_S
      d_S = kept d_S + (read q)^T d_o

  Refs as in `forward`; of d_rate `[1, 1, 1, c]`, which is yet to be summed, and d_exponent
  `[1, 1, 1, tokens]` at most one is not `None`. Scratch: the states before the chunks of the block,
  found anew from the first; S; d_S.
  """
  states, state, d_state = scratch
  dot, dot_transposed, transposed_dot = _products(q.dtype)
  narrow = functools.partial(jax.lax.convert_element_type, new_dtype=q.dtype)

  def leaving(weights, keys):
    return narrow(_scale(weights.leave, keys.astype(jnp.float32)))

  @pl.when(pl.program_id(2) == 0)
  def _():
    block.fill()
    d_state[...] = d_after[0, 0]
    if d_rate is not None:
      d_rate[...] = jnp.zeros_like(d_rate)

  chunks = _chunks(q)
  states[0] = starts[0, 0, 0]
  state[...] = starts[0, 0, 0].astype(jnp.float32)
  for n, rows in chunks[:-1]:
    weights = block.weights(rows).loaded()
    keys = leaving(weights, k[0, rows])
    for columns in _columns(v, VALUES):
      before = block.scale_state(weights.kept, state[:, columns])
      state[:, columns] = before + transposed_dot(keys, v[0, rows, columns])
      states[n + 1, :, columns] = narrow(state[:, columns])

  for n, rows in reversed(chunks):
    weights = block.weights(rows).loaded()
    queries, keys, values, d_out = q[0, rows], k[0, rows], v[0, rows], d_o[0, rows]
    scores = dot_transposed(queries, keys) * weights.pairs
    d_weighted = dot_transposed(d_out, values)
    d_scores = narrow(d_weighted * weights.pairs)
    read = block.scale_state(weights.read, dot_transposed(d_out, states[n]))
    left = _scale(weights.leave, dot_transposed(values, narrow(d_state[...])))
    d_q[0, rows] = (dot(d_scores, keys) + read).astype(d_q.dtype)
    d_k[0, rows] = (transposed_dot(d_scores, queries) + left).astype(d_k.dtype)

    if d_rate is not None or d_exponent is not None:
      pairs = scores * d_weighted
      read, left = queries.astype(jnp.float32) * read, keys.astype(jnp.float32) * left
      kept = d_state[...] * block.scale_state(weights.kept, states[n].astype(jnp.float32))
      if d_rate is not None:
        d_rate[0, 0] += _rate_gradient(*block.counts(rows), pairs, read, left, kept)
      else:
        d_exponent[0, 0, :, rows] = _exponent_gradient(pairs, read, left, kept)

    scores = narrow(scores)
    reading = narrow(_scale(weights.read, queries.astype(jnp.float32)))
    for columns in _columns(v, VALUES):
      d_out, d_s = d_o[0, rows, columns], d_state[:, columns]
      d_values = transposed_dot(scores, d_out) + dot(leaving(weights, keys), narrow(d_s))
      d_v[0, rows, columns] = d_values.astype(d_v.dtype)
      d_state[:, columns] = block.scale_state(weights.kept, d_s) + transposed_dot(reading, d_out)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    d_before[0, 0] = d_state[...]


# Every weight is the exponential of a difference of two sums of log decays, so the gradient of the
# difference is the weighted term times its own gradient: `pairs` [c, c], `read` and `left` [c, k],
# `kept` [k, v].


def _rate_gradient(column, row, pairs, read, left, kept):
  """[1, c], to be summed."""
  last = column[CHUNK - 1 :]

  def folded(x):
    x = jnp.sum(x, axis=0, keepdims=True)
    return sum(x[:, start : start + CHUNK] for start in range(0, x.shape[1], CHUNK))

  within = folded((column - row) * pairs) + folded(_scale(column, read))
  return within + folded(_scale(last - column, left)) + last * folded(kept)


def _exponent_gradient(pairs, read, left, kept):
  """[1, c]. The weight of a token in its own output cancels exactly."""
  at_last = jnp.sum(left, keepdims=True) + jnp.sum(kept, keepdims=True)
  of_tokens = jnp.sum(pairs.T - pairs, axis=0, keepdims=True)
  of_tokens += jnp.sum((read - left).T, axis=0, keepdims=True)
  return of_tokens + jnp.where(_numbers(1)[:1] == CHUNK - 1, at_last, 0)
