"""Retention one token at a time, its state written once in `W` tokens: a prototype.

The state `S` of `n` tokens ago is kept, and the tokens since as they came. With `A` the running sum
of log decays since, an output reads both,

    o = exp(A) S^T q + sum_j exp(A - A_j) (q . k_j) v_j        j = 1 ... n

and the last of `W` tokens writes `S' = exp(A) S + sum_j exp(A - A_j) k_j v_j^T`. A reset or padding
is a weight of 0, so that rows may begin and pause at any token, and all write at the same one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from triform.kernels.runs import weigh


class Replay(NamedTuple):
  state: jax.Array  # [b, h, k, v]
  keys: jax.Array  # [b, W, g, k]
  values: jax.Array  # [b, W, g, v]
  sums: jax.Array  # [b, 1 + W, h], A_j of the state and the tokens since; inf: forgotten
  sum: jax.Array  # [b, h], A


def start(state: jax.Array, window: int, g: int, dtype) -> Replay:
  b, h, k, v = state.shape
  keys, values = (jnp.zeros((b, window, g, size), dtype) for size in (k, v))
  return Replay(state, keys, values, *_nothing_since(b, window, h))


def _nothing_since(b, window, h):
  sums = jnp.full((b, 1 + window, h), jnp.inf).at[:, 0].set(0.0)
  return sums, jnp.zeros((b, h))


def step(n, q, k, v, log_decay, replay: Replay, reset=None, mask=None, *, write: bool):
  """Token `n` of `W`, 0 the first; `write` at the last. Arguments as of `kernels.retention`."""
  h = q.shape[2]
  state, keys, values, sums, total = replay
  new_total = total + (log_decay[None] if log_decay.ndim == 1 else log_decay[:, 0])
  own = new_total
  if mask is not None:
    k, v = (jnp.where(mask[..., None, None], a, 0) for a in (k, v))
    reset = None if reset is None else reset & mask
    new_total, own = jnp.where(mask, new_total, total), jnp.where(mask, new_total, jnp.inf)
  if reset is not None:
    sums = jnp.where(reset[..., None], jnp.inf, sums)
  keys = jax.lax.dynamic_update_slice_in_dim(keys, k, n, axis=1)
  values = jax.lax.dynamic_update_slice_in_dim(values, v, n, axis=1)
  sums = jax.lax.dynamic_update_slice_in_dim(sums, own[:, None], n + 1, axis=1)

  real = jnp.isfinite(sums[:, 1:, 0])[..., None, None]  # 0 * NaN is NaN
  known, shown = jnp.where(real, keys, 0), jnp.where(real, values, 0)
  weights = jnp.exp(new_total[:, None] - sums)  # [b, 1 + W, h]
  kept, weights = weights[:, 0, :, None], weights[:, 1:].swapaxes(1, 2)
  q = q[:, 0].astype(state.dtype)
  if not write:
    read = weigh(kept, jnp.einsum("bhk,bhkv->bhv", q, state))
    scores = weights * jnp.sum(q[:, :, None] * _by_head(known, h), axis=-1)
    o = read + jnp.sum(scores[..., None] * _by_head(shown, h), axis=2)
    return o[:, None].astype(v.dtype), Replay(state, keys, values, sums, new_total)
  new = weigh(kept[..., None], state)
  for j in range(keys.shape[1]):  # not a product of matrices, which would be written, then added
    key = weights[..., j, None] * _of_heads(known[:, j], h)
    new += key[..., None] * _of_heads(shown[:, j], h)[:, :, None]
  if mask is not None:
    untouched = (sums[:, 0, 0] == 0) & ~jnp.any(real, axis=(1, 2, 3))
    new = jnp.where(untouched[:, None, None, None], state, new)
  o = jnp.einsum("bhk,bhkv->bhv", q, new)
  nothing = _nothing_since(len(state), keys.shape[1], h)
  return o[:, None].astype(v.dtype), Replay(new, keys, values, *nothing)


def _by_head(records, h):
  """[b, W, g, size] to float32 [b, h, W, size]."""
  return jnp.repeat(records.swapaxes(1, 2), h // records.shape[2], axis=1).astype(jnp.float32)


def _of_heads(record, h):
  return jnp.repeat(record, h // record.shape[1], axis=1).astype(jnp.float32)
