"""Positions of tokens in their documents, counted exactly across calls, packing and padding."""

import jax
import jax.numpy as jnp


def token_positions(
  start: jax.Array,  # uint32[b]
  reset: jax.Array | None,  # bool[b, t]
  mask: jax.Array | None,  # bool[b, t]
  length: int,
) -> tuple[jax.Array, jax.Array]:  # uint32[b, t], uint32[b]
  """Numbers every token within its document and returns the count to carry to the next call.

  A real token at which `reset` is true has position 0; a masked token advances nothing, and the
  position it is given is that of the token before it. `start` is the number of tokens of the
  current document already seen. Counts are unsigned 32-bit integers and wrap.
  """
  start = jnp.asarray(start).astype(jnp.uint32)
  b = start.shape[0]
  if mask is None:
    seen = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (b, length))
  else:
    seen = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
  count = start[:, None] + seen.astype(jnp.uint32)
  if reset is not None:
    starts_here = reset if mask is None else reset & mask
    document_start = jax.lax.cummax(jnp.where(starts_here, seen, 0), axis=1)
    in_document = (seen - document_start + 1).astype(jnp.uint32)
    count = jnp.where(document_start > 0, in_document, count)
  before_any = (seen == 0) & (start == 0)[:, None]
  return jnp.where(before_any, 0, count - 1), count[:, -1]


def decayed_count(
  position: jax.Array,  # uint32[b, t]
  log_decay: jax.Array,  # [h], at most 0
) -> jax.Array:  # [b, t, h]
  """`sum_{j <= position} decay^j = (1 - decay^(position + 1)) / (1 - decay)`, for every head."""
  log_decay = jnp.asarray(log_decay)[None, None]
  dtype = log_decay.dtype
  count = (jnp.asarray(position).astype(dtype) + 1)[..., None]
  decays = jnp.where(log_decay == 0, -1, log_decay)  # the closed form is 0/0 at decay 1
  return jnp.where(log_decay == 0, count, jnp.expm1(decays * count) / jnp.expm1(decays))
