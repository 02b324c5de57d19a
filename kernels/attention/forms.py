"""The three forms of attention, which differ in how many queries they take at a time.

What a query sees follows from the position of tokens in their documents, not from their index, so
padding may stand anywhere; but with a window, the first two expect it at the end, so that the keys
of near positions are near. The caller has zeroed q, k and v at tokens that are not real.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .platform import attend, attend_causally


class KVCache(NamedTuple):
  """Keys and values of the current document.

  Token `p` is in row `p`, and the rows after the last are zero; with a window, the last tokens are
  in rows `p % rows`.
  """

  k: jax.Array  # [b, s, g, k]
  v: jax.Array  # [b, s, g, k]
  position: jax.Array  # uint32[b], tokens seen of the document


class Rule(NamedTuple):
  """What scores become, the same for all tokens; see `attention`."""

  window: int | None
  bias: jax.Array | None  # [h, n]
  scale: float
  tanh: bool


class Tokens(NamedTuple):
  """What decides who sees whom."""

  position: jax.Array  # uint32[b, t], in the document
  document: jax.Array | None  # int32[b, t], 0 being that of the cache
  real: jax.Array | None  # bool[b, t]


def parallel(q, k, v, tokens, cache, seen, *, fresh, rule):
  """All queries at once."""
  if fresh and rule.bias is None and not rule.tanh:
    segments = tokens.document
    if tokens.real is not None:  # padding sees padding
      segments = jnp.where(tokens.real, 0 if segments is None else segments, -1)
    out = attend_causally(q, k, v, segments, window=rule.window, scale=rule.scale)
  else:
    keys = (k, v, tokens) if fresh else _after_cache(k, v, tokens, cache, rule.window)
    out = _attend(q, *keys[:2], tokens, keys[2], rule)
  return out, *_written(cache, k, v, tokens, seen, rule.window)


def chunkwise(q, k, v, tokens, cache, seen, *, fresh, rule, chunk_size):
  """A chunk of queries at a time, the scores of one chunk being all that is kept."""
  after = _written(cache, k, v, tokens, seen, rule.window)
  t, c, window = q.shape[1], min(chunk_size, q.shape[1]), rule.window
  keys = (
    (k, v, tokens) if fresh and window is None else _after_cache(k, v, tokens, cache, rule.window)
  )

  def pad(a):
    return jnp.pad(a, [(0, 0), (0, -t % c)] + [(0, 0)] * (a.ndim - 2))

  def split(a):
    return jnp.swapaxes(pad(a).reshape(a.shape[0], -1, c, *a.shape[2:]), 0, 1)

  if window is not None:
    keys = jax.tree.map(pad, keys)

  @jax.checkpoint
  def chunk(start, queries):
    q, tokens = queries
    near = keys
    if window is not None:
      near = jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, start, window + c, axis=1), keys
      )
    return start + c, _attend(q, *near[:2], tokens, near[2], rule)

  _, out = jax.lax.scan(chunk, jnp.int32(0), jax.tree.map(split, (q, tokens)))
  out = jnp.swapaxes(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :t]
  return out, *after


def recurrent(q, k, v, tokens, cache, seen, *, fresh, rule):
  """One token after another, the cache being all that is kept."""
  del seen, fresh
  (b, rows), window = cache.k.shape[:2], rule.window
  starts = None
  if tokens.document is not None:
    starts = jnp.diff(tokens.document, axis=1, prepend=0) > 0

  def step(held, token):
    q, k, v, position, starts, real = token
    if starts is not None:
      held = jax.tree.map(lambda a: jnp.where(starts[:, None, None, None], 0, a), held)
    row = position % rows if window is not None else position
    if real is not None:
      row = jnp.where(real, row, rows)
    held = jax.tree.map(
      lambda a, new: a.at[jnp.arange(b), row].set(new.astype(a.dtype), mode="drop"), held, (k, v)
    )
    query = Tokens(position[:, None], None, None)
    keys = _cache_tokens(position + 1, rows, window)
    out = _attend(q[:, None], *(a.astype(k.dtype) for a in held), query, keys, rule)
    return held, out[:, 0]

  by_time = jax.tree.map(
    lambda a: jnp.swapaxes(a, 0, 1), (q, k, v, tokens.position, starts, tokens.real)
  )
  (keys, values), out = jax.lax.scan(step, (cache.k, cache.v), by_time)
  return jnp.swapaxes(out, 0, 1), keys, values


def _attend(q, k, v, queries: Tokens, keys: Tokens, rule: Rule):
  distance = (queries.position[:, :, None] - keys.position[:, None]).astype(jnp.int32)
  visible = distance >= 0
  if rule.window is not None:
    visible &= distance < rule.window
  if keys.document is not None:
    visible &= queries.document[:, :, None] == keys.document[:, None]
  if keys.real is not None:
    visible &= keys.real[:, None]
  bias = rule.bias
  if bias is not None:
    bias = jnp.moveaxis(jnp.take(bias, jnp.clip(distance, 0, bias.shape[1] - 1), axis=1), 0, 1)
  return attend(q, k, v, visible, bias, rule.scale, tanh=rule.tanh)


def _cache_tokens(count: jax.Array, rows: int, window: int | None) -> Tokens:
  """The tokens in the rows of a cache of a document of `count` tokens."""
  row = jnp.arange(rows, dtype=jnp.uint32)[None]
  real = row < count[:, None]
  if window is None:
    return Tokens(jnp.broadcast_to(row, real.shape), None, real)
  last = count[:, None] - 1
  return Tokens(last - (last - row) % rows, None, real)


def _after_cache(k, v, tokens: Tokens, cache: KVCache, window: int | None):
  """Keys, values and tokens of the cache, in order, and of the call after them."""
  held = (cache.k.astype(k.dtype), cache.v.astype(v.dtype))
  cached = _cache_tokens(cache.position, cache.k.shape[1], window)
  if window is not None:
    turn = (cache.position[:, None] % window + jnp.arange(window, dtype=jnp.uint32)[None]) % window
    held, cached = take_tokens((held, cached), turn)
  real = jnp.ones(k.shape[:2], bool) if tokens.real is None else tokens.real
  document = tokens.document
  if document is not None:
    that_of_the_cache = jnp.zeros(cached.real.shape, document.dtype)
    document = jnp.concatenate([that_of_the_cache, document], axis=1)
  position = jnp.concatenate([cached.position, tokens.position], axis=1)
  real = jnp.concatenate([cached.real, real], axis=1)
  keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(held, (k, v), strict=True))
  return keys, values, Tokens(position, document, real)


def _written(cache: KVCache, k, v, tokens: Tokens, seen, window: int | None):
  """Keys and values of the cache after the call."""
  b, rows = cache.k.shape[:2]
  position, document, real = tokens
  kept = jnp.ones(position.shape, bool) if real is None else real
  held = (cache.k, cache.v)
  if document is not None:
    last = document.max(axis=1)
    kept &= document == last[:, None]
    begun = (last > 0)[:, None, None, None]
    held = jax.tree.map(lambda a: jnp.where(begun, 0, a), held)
  row = position
  if window is not None:
    kept &= seen[:, None] - position <= rows  # no two tokens write one row
    row = position % rows
  row = jnp.where(kept, row, rows)
  index = (jnp.arange(b)[:, None], row)
  return [
    a.at[index].set(new.astype(a.dtype), mode="drop") for a, new in zip(held, (k, v), strict=True)
  ]


def take_tokens(arrays, index):
  """The tokens `index` `[b, n]` of arrays `[b, t, ...]`."""
  return jax.tree.map(
    lambda a: jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), axis=1),
    arrays,
  )
