"""Retention one token at a time, its state written once in `W` tokens.

The state `S` of `n` tokens ago is kept, and the tokens since as they came. With `A` the running sum
of log decays since, an output reads both,

    o = exp(A) S^T q + sum_j exp(A - A_j) (q . k_j) v_j        j = 1 ... n

and the last of `W` tokens writes `S' = exp(A) S + sum_j exp(A - A_j) k_j v_j^T`. A reset or padding
is a weight of 0, so that rows may begin and pause at any token, and all write at the same one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..checks import check_heads, check_shapes
from ..runs import weigh


class RetentionReplay(NamedTuple):
  """A state and the tokens since: `state` is that of now where none are."""

  state: jax.Array  # [b, h, k, v]
  keys: jax.Array  # [b, W, g, k]
  values: jax.Array  # [b, W, g, v]
  sums: jax.Array  # float32[b, 1 + W, h], A_j of the state and the tokens since; inf: forgotten
  sum: jax.Array  # float32[b, h], A


def new_replay(state: jax.Array, window: int, num_kv_heads: int, dtype) -> RetentionReplay:
  """After `state` `[b, h, k, v]`, room for `window` keys and values of `dtype`."""
  if window < 1:
    raise ValueError(f"window is {window}, expected at least 1")
  b, h, k, v = state.shape
  if h % num_kv_heads:
    raise ValueError(f"{h} query heads cannot share {num_kv_heads} key/value heads evenly")
  keys, values = (jnp.zeros((b, window, num_kv_heads, size), dtype) for size in (k, v))
  return RetentionReplay(state, keys, values, *_nothing_since(b, window, h))


def _nothing_since(b, window, h):
  sums = jnp.full((b, 1 + window, h), jnp.inf).at[:, 0].set(0.0)
  return sums, jnp.zeros((b, h))


@jax.named_scope("mixing")
def retention_step(
  n: jax.Array | int,  # int[], tokens since the state was written
  q: jax.Array,  # [b, 1, h, k]
  k: jax.Array,  # [b, 1, g, k]
  v: jax.Array,  # [b, 1, g, v]
  log_decay: jax.Array,  # [h] or [b, 1, h], at most 0
  replay: RetentionReplay,
  *,
  write: bool,
  reset: jax.Array | None = None,  # bool[b, 1]
  mask: jax.Array | None = None,  # bool[b, 1]
) -> tuple[jax.Array, RetentionReplay]:  # [b, 1, h, v]
  """The next token of `retention`, which writes the state only if asked to.

  Decoding moves the bytes of states; this reads a state where `form="recurrent"` reads and writes
  it (Sun et al., RetNet, section 2.1, equation 6), for some keys and values more. Call with `n` of
  0, 1, ... and `write=True` when `n` is the last that there is room for, or before; then begin at 0
  again. Arguments, resets and padding otherwise as of `retention`.

  Returns:
    Outputs in the dtype of `v`. `state` is up to date after `write`.

  Raises:
    ValueError: for shapes that do not fit together.
  """
  check_heads(q=q, k=k, v=v)
  (b, h, k_size, v_size), g = replay.state.shape, replay.keys.shape[2]
  expected = {
    "q": (q, {(b, 1, h, k_size)}),
    "k": (k, {(b, 1, g, k_size)}),
    "v": (v, {(b, 1, g, v_size)}),
    "log_decay": (log_decay, {(h,), (b, 1, h)}),
    "reset": (reset, {(b, 1)}),
    "mask": (mask, {(b, 1)}),
  }
  check_shapes(f"a state {list(replay.state.shape)} and {g} key/value heads", expected)
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
    return o[:, None].astype(v.dtype), RetentionReplay(state, keys, values, sums, new_total)
  new = weigh(kept[..., None], state)
  for j in range(keys.shape[1]):  # not a product of matrices, which would be written, then added
    key = weights[..., j, None] * _of_heads(known[:, j], h)
    new += key[..., None] * _of_heads(shown[:, j], h)[:, :, None]
  if mask is not None:
    untouched = (sums[:, 0, 0] == 0) & ~jnp.any(real, axis=(1, 2, 3))
    new = jnp.where(untouched[:, None, None, None], state, new)
  o = jnp.einsum("bhk,bhkv->bhv", q, new)
  nothing = _nothing_since(len(state), keys.shape[1], h)
  return o[:, None].astype(v.dtype), RetentionReplay(new, keys, values, *nothing)


def _by_head(records, h):
  """[b, W, g, size] to float32 [b, h, W, size]."""
  return jnp.repeat(records.swapaxes(1, 2), h // records.shape[2], axis=1).astype(jnp.float32)


def _of_heads(record, h):
  return jnp.repeat(record, h // record.shape[1], axis=1).astype(jnp.float32)
