"""Weights with which tokens and the state before them enter a decaying sum, run by run.

Within a run let `n_i` count the real tokens up to token `i`, `s_i` the documents begun, and
`A_i = log_decay n_i` (or the running sum of a per-token log decay). Then token `j` enters output
`i` with weight

    exp(A_i - A_j)   if j <= i, token j is real and s_i = s_j,   else 0

and the state before the run with weight `exp(A_i)` if `s_i = 0`, else 0. The state after it is what
the last token sees. Counting only real tokens makes a padded tail exact without code of its own.

Arrays are run-major, then head-major, [n, b, g, r, c, ...], with n runs of c tokens and r = h / g
query heads to a key/value head: products and a scan over runs then take them as they are. An axis
on which nothing depends has size 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .sharding import varying_as


class Runs(NamedTuple):
  """What the weights of the tokens of a run are made of."""

  rate: jax.Array  # [1, 1, g, r, 1], `A = rate * count`
  count: jax.Array  # [..., c], n_i, or A_i itself (and rate 1) for a per-token decay
  documents: jax.Array | None  # int32[..., c], s_i
  real: jax.Array | None  # bool[..., c]

  def pairs(self, start: int, stop: int) -> jax.Array:
    """Weights of tokens [0, stop) in outputs [start, stop): [..., stop - start, stop]."""

    def rows(a):
      return a[..., start:stop, None]

    def columns(a):
      return a[..., None, :stop]

    positions = jnp.arange(stop)[None, None, None, None]
    visible = rows(positions) >= columns(positions)
    if self.real is not None:
      visible &= columns(self.real)
    if self.documents is not None:
      visible &= rows(self.documents) == columns(self.documents)
    exponent = self.rate[..., None] * (rows(self.count) - columns(self.count))
    # The mask goes inside the exponential: outside, 0 * inf would make NaN gradients.
    return jnp.exp(jnp.where(visible, exponent, -jnp.inf))

  def incoming(self) -> jax.Array:
    """Weights of the incoming state in every output: [..., c]."""
    exponent = self.rate * self.count
    if self.documents is not None:
      exponent = jnp.where(self.documents == 0, exponent, -jnp.inf)
    return jnp.exp(exponent)


def make_runs(
  log_decay: jax.Array,  # [h] or [b, t, h], in `dtype`
  reset: jax.Array | None,  # bool[b, t]
  mask: jax.Array | None,  # bool[b, t]
  g: int,
  c: int,
  dtype: jnp.dtype,
) -> Runs:
  """The `t / c` runs of `t` tokens. A per-token log decay is 0 at padding."""
  real = None if mask is None else by_head(mask[..., None], 1, c)
  if log_decay.ndim == 1:
    rate = log_decay.reshape(1, 1, g, -1, 1)
    tokens = jnp.ones((1, 1, 1, 1, c), bool) if real is None else real
    count = jnp.cumsum(tokens, axis=-1, dtype=jnp.int32).astype(dtype)
  else:
    rate = jnp.ones((1, 1, 1, 1, 1), dtype)
    decays = by_head(log_decay, g, c)
    count = jnp.cumsum(decays, axis=-1)
  documents = None
  if reset is not None:
    starts = reset if mask is None else reset & mask
    documents = jnp.cumsum(by_head(starts[..., None], 1, c), axis=-1, dtype=jnp.int32)
  return Runs(rate, count, documents, real)


def by_head(x: jax.Array, g: int, c: int) -> jax.Array:
  """[b, n c, g r, ...] to [n, b, g, r, c, ...]."""
  b, t, h = x.shape[:3]
  x = x.reshape(b, t // c, c, g, h // g, *x.shape[3:])
  return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))


def by_time(x: jax.Array, t: int, dtype) -> jax.Array:
  """[n, b, g, r, c, v] to [b, t, g r, v], dropping the padded tail."""
  n, b, g, r, c, v = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * c, g * r, v)[:, :t].astype(dtype)


def pad_to_runs(c: int, reset, mask, *tokens):
  """`reset`, `mask` and arrays `[b, t, ...]`, with padding up to a multiple of `c` tokens."""
  b, t = tokens[0].shape[:2]
  if t % c == 0:
    return reset, mask, *tokens
  mask = jnp.ones((b, t), bool) if mask is None else mask

  def pad(a):
    return jnp.pad(a, [(0, 0), (0, -t % c)] + [(0, 0)] * (a.ndim - 2))

  return None if reset is None else pad(reset), pad(mask), *map(pad, tokens)


def in_runs(c: int, a: jax.Array) -> jax.Array:
  """[b, n c, ...] to [n, b, c, ...]."""
  return a.reshape(a.shape[0], -1, c, *a.shape[2:]).swapaxes(0, 1)


def states_before(state: jax.Array, kept: jax.Array, added: jax.Array, **scan):
  """The state after all runs, and those before each: `S' = kept S + added`, [n, ...].

  Backward in time, from the last run to the first, with the option `reverse` of `jax.lax.scan`.
  """

  def step(before, run):
    kept, added = run
    return weigh(kept, before) + added, before

  return jax.lax.scan(step, varying_as(added, state), (kept, added), **scan)


def weigh(weights: jax.Array, x: jax.Array) -> jax.Array:
  """`weights * x`, but 0 where the weight is 0: a reset forgets a state that is not finite too."""
  return jnp.where(weights == 0, 0, weights * x)


def untouched_if_masked(
  new: jax.Array,  # [b, h, k, v]
  old: jax.Array,  # [b, h, k, v]
  mask: jax.Array | None,  # bool[b, t]
) -> jax.Array:
  """Keeps the state of rows without a real token bit for bit (-0.0 included)."""
  if mask is None:
    return new
  return jnp.where(mask.any(axis=1)[:, None, None, None], new, old)
