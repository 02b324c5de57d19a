"""Causal convolution over time, with the inputs it still needs carried between calls."""

import jax
import jax.numpy as jnp


def causal_shifts(
  x: jax.Array,  # [b, t, d]
  before: int,
  *,
  tail: jax.Array | None = None,  # [b, before, d]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
) -> tuple[list[jax.Array], jax.Array]:  # before + 1 times [b, t, d], [b, before, d]
  """`x_{i-s}` for s from 0 to `before`, within a document, which zeros precede.

  Args:
    x: inputs.
    before: how far back.
    tail: the last inputs of the document before this call, newest last; zeros if `None`.
    reset: true at the first token of a document.
    mask: false at padding: only real tokens are counted back. The output there is unspecified.

  Returns:
    The shifted inputs, and the tail to carry on with.
  """
  b, t, d = x.shape
  if tail is None:
    tail = jnp.zeros((b, before, d), x.dtype)
  kept, tail = tail.dtype, tail.astype(x.dtype)

  def in_place(x):
    """The inputs one after another without padding, and shifted."""
    inputs = jnp.concatenate([tail, x], axis=1)
    return inputs, [inputs[:, before - s : before - s + t] for s in range(before + 1)]

  def gathered(x):
    x = _take(x, jnp.argsort(~mask, axis=1, stable=True))
    inputs = jnp.concatenate([tail, x], axis=1)
    return inputs, [
      _take(inputs, jnp.maximum(before + count - 1 - s, 0)) for s in range(before + 1)
    ]

  # `count` real inputs up to each token.
  if mask is None:
    count = jnp.broadcast_to(jnp.arange(1, t + 1), (b, t))
    inputs, shifts = in_place(x)
  else:
    count = jnp.cumsum(mask, axis=1)
    # Padding is at the end as a rule, where nothing has to be moved, which CPUs are slow at.
    at_end = jnp.all(mask[:, 1:] <= mask[:, :-1])
    x = jnp.where(mask[..., None], x, 0)
    inputs, shifts = jax.lax.cond(at_end, in_place, gathered, x)
  first = jnp.zeros_like(count)  # the count at the first token of its document, if in this call
  if reset is not None:
    starts = reset if mask is None else reset & mask
    first = jax.lax.cummax(jnp.where(starts, count, 0), axis=1)

  def inside(count, first):
    return ((first == 0) | (count >= first))[..., None]

  if reset is not None:
    shifts = [jnp.where(inside(count - s, first), x, 0) for s, x in enumerate(shifts)]
  after = count[:, -1:] + jnp.arange(before)[None]
  new = _take(inputs, after)
  new = jnp.where(inside(after - before + 1, first[:, -1:]), new, 0)
  return shifts, new.astype(kept)


@jax.named_scope("convolution")
def causal_depthwise_conv(
  x: jax.Array,  # [b, t, d]
  taps: jax.Array,  # [n, d]
  *,
  tail: jax.Array | None = None,  # [b, n - 1, d]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
) -> tuple[jax.Array, jax.Array]:  # [b, t, d], [b, n - 1, d]
  """`y_i = sum_s taps_s x_{i-s}` within a document; `taps` has that of the token itself first.

  Others as in `causal_shifts`. Outputs are in the dtype of `x`, summed in at least float32.
  """
  shifts, tail = causal_shifts(x, taps.shape[0] - 1, tail=tail, reset=reset, mask=mask)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  y = jnp.zeros(x.shape, dtype)
  for s, shifted in enumerate(shifts):
    y += taps[s].astype(dtype)[None, None] * shifted.astype(dtype)
  return y.astype(x.dtype), tail


def _take(x, index):  # [b, t, d], int[b, n] -> [b, n, d]
  return jnp.take_along_axis(x, index[..., None], axis=1)
