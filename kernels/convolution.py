"""Causal depthwise convolution over time, with the inputs it still needs carried between calls."""

import jax
import jax.numpy as jnp


@jax.named_scope("convolution")
def causal_depthwise_conv(
  x: jax.Array,  # [b, t, d]
  taps: jax.Array,  # [n, d]
  *,
  tail: jax.Array | None = None,  # [b, n - 1, d]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
) -> tuple[jax.Array, jax.Array]:  # [b, t, d], [b, n - 1, d]
  """`y_i = sum_s taps_s x_{i-s}` within a document, which zeros precede.

  Args:
    x: inputs.
    taps: weights by distance, that of the token itself first.
    tail: the last inputs of the document before this call, newest last; zeros if `None`.
    reset: true at the first token of a document.
    mask: false at padding: taps count real tokens only. The output there is unspecified.

  Returns:
    Outputs in the dtype of `x`, summed in at least float32, and the tail to carry on with.
  """
  b, t, d = x.shape
  before = taps.shape[0] - 1
  if tail is None:
    tail = jnp.zeros((b, before, d), x.dtype)
  # The inputs one after another without padding; `count` real ones up to each token.
  if mask is None:
    count = jnp.broadcast_to(jnp.arange(1, t + 1), (b, t))
    inputs = x
  else:
    count = jnp.cumsum(mask, axis=1)
    inputs = _take(jnp.where(mask[..., None], x, 0), jnp.argsort(~mask, axis=1, stable=True))
  inputs = jnp.concatenate([tail.astype(x.dtype), inputs], axis=1)
  first = jnp.zeros_like(count)  # the count at the first token of its document, if in this call
  if reset is not None:
    starts = reset if mask is None else reset & mask
    first = jax.lax.cummax(jnp.where(starts, count, 0), axis=1)

  def inside(count, first):
    return ((first == 0) | (count >= first))[..., None]

  dtype = jnp.promote_types(x.dtype, jnp.float32)
  y = jnp.zeros(x.shape, dtype)
  for s in range(before + 1):
    if mask is None:
      shifted = inputs[:, before - s : before - s + t]
    else:
      shifted = _take(inputs, jnp.maximum(before + count - 1 - s, 0))
    shifted = jnp.where(inside(count - s, first), shifted, 0)
    y += taps[s].astype(dtype)[None, None] * shifted.astype(dtype)

  after = count[:, -1:] + jnp.arange(before)[None]
  new = _take(inputs, after)
  new = jnp.where(inside(after - before + 1, first[:, -1:]), new, 0)
  return y.astype(x.dtype), new.astype(tail.dtype)


def _take(x, index):  # [b, t, d], int[b, n] -> [b, n, d]
  return jnp.take_along_axis(x, index[..., None], axis=1)
