"""Rows in pieces, each computed by itself: what one keeps of the state before it and adds to it.

Over a piece `S' = kept S + added`, whatever S is. So a pass over the keys and values of all pieces
at once, `states_before`, and a pass over all pieces at once are the pass over the row.
"""

import jax
import jax.numpy as jnp

from ..runs import states_before, untouched_if_masked


def over_shards(
  axis: str,  # of the mesh, by which the tokens are divided; by hand (`jax.shard_map`)
  k: jax.Array,  # [b, t, g, k], 0 at masked tokens, as are v and a log decay per token
  v: jax.Array,  # [b, t, g, v]
  log_decay: jax.Array,  # [h] or [b, t, h]
  state: jax.Array,  # [b, h, k, v], before the first shard; sums are in its dtype
  reset: jax.Array | None,  # bool[b, t]
  mask: jax.Array | None,  # bool[b, t]
) -> tuple[jax.Array, jax.Array]:  # [b, h, k, v] twice
  """The states before this shard and after the last one. Only states are exchanged."""
  piece = kept_and_added(k, v, log_decay.astype(state.dtype), reset, mask)
  real = None if mask is None else mask.any(axis=1)
  # Known to be the same everywhere, what is gathered may be a replicated result; without check_vma
  # nothing is known to vary, and JAX 0.10.2 would not add up the shards' gradients.
  checked = axis in jax.typeof(piece[1]).manual_axis_type.varying
  gathered = "invarying" if checked else "varying"
  kept, added, real = jax.lax.all_gather((*piece, real), axis, to=gathered)
  final, before = states_before(state, kept[..., None, None], added)
  final = untouched_if_masked(final, state, None if real is None else real.T)
  return before[jax.lax.axis_index(axis)], final


def kept_and_added(k, v, log_decay, reset, mask) -> tuple[jax.Array, jax.Array]:
  """[b, h] and [b, h, k, v] of a row from every token on, in one product, in log_decay's dtype.

  Log decays are summed from the end: the sums of the tokens that weigh most are the smallest.
  """
  (b, t, g, _), dtype = k.shape, log_decay.dtype
  real = jnp.ones((b, t), bool) if mask is None else mask
  if log_decay.ndim == 1:
    exponent = log_decay[None, None] * _from_each(real)[..., None].astype(dtype)
  else:
    exponent = _from_each(log_decay)
  if reset is not None:
    exponent = jnp.where(_from_each(reset & real)[..., None] == 0, exponent, -jnp.inf)
  weights = jnp.exp(exponent)
  kept, weights = weights[:, 0], weights[:, 1:].reshape(b, t, g, -1, 1)
  # The matrix unit takes bfloat16; of float32 it must be asked for all of it, as the kernels do.
  precision = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
  weighted = weights * k[:, :, :, None].astype(dtype)
  added = jnp.einsum("btgrk,btgv->bgrkv", weighted, v.astype(dtype), precision=precision)
  return kept, added.reshape(b, -1, *added.shape[3:])


def _from_each(a):
  """Sums of [b, t, ...] from each token on, and from behind the last: [b, t + 1, ...]."""
  a = a.astype(jnp.int32) if a.dtype == bool else a
  sums = jax.lax.cumsum(a, axis=1, reverse=True)
  return jnp.pad(sums, [(0, int(axis == 1)) for axis in range(a.ndim)])
