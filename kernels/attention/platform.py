"""Attention of some queries to some keys, by the best that JAX has on each platform.

On GPUs that is XLA's. Of cuDNN's, JAX offers causal attention and windows but no documents: these
would be an additive mask `[b, 1, t, t]` in memory, and its gradient as well.
"""

import jax
import jax.numpy as jnp

from . import tpu


def attend(
  q: jax.Array,  # [b, t, h, k]
  k: jax.Array,  # [b, s, g, k]
  v: jax.Array,  # [b, s, g, k]
  visible: jax.Array,  # bool[b, t, s]
  bias: jax.Array | None,  # [b, h, t, s]
  scale: float,
  *,
  tanh: bool = False,
) -> jax.Array:  # [b, t, h, k]
  """`softmax(scale q k^T + bias) v` over the visible keys; a query that sees none gets a mean."""
  visible = visible[:, None]
  if tanh or q.dtype == jnp.float64:
    return _plain(q, k, v, visible, bias, scale, tanh)
  return jax.nn.dot_product_attention(q, k, v, bias, visible, scale=scale)


def attend_causally(
  q: jax.Array,  # [b, t, h, k]
  k: jax.Array,  # [b, t, g, k]
  v: jax.Array,  # [b, t, g, k]
  segments: jax.Array | None,  # int32[b, t], tokens see their own segment
  *,
  window: int | None,
  scale: float,
) -> jax.Array:  # [b, t, h, k]
  """Causal self-attention; by index, not by position, so a segment must have no holes."""

  def anywhere(q, k, v, segments):
    t = q.shape[1]
    distance = jnp.arange(t)[:, None] - jnp.arange(t)[None]
    visible = (distance >= 0)[None]
    if window is not None:
      visible &= (distance < window)[None]
    if segments is not None:
      visible &= segments[:, :, None] == segments[:, None]
    return attend(q, k, v, visible, None, scale)

  if not tpu.supports(q):
    return anywhere(q, k, v, segments)

  def on_tpu(q, k, v, segments):
    return tpu.attention(q, k, v, segments, window=window, scale=scale)

  return jax.lax.platform_dependent(q, k, v, segments, tpu=on_tpu, default=anywhere)


def _plain(q, k, v, visible, bias, scale, tanh):
  """For what `jax.nn.dot_product_attention` has not: it takes any softmax in float32."""
  b, t, h, size = q.shape
  g, dtype = k.shape[2], jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(b, t, g, h // g, size)
  scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=dtype) * scale
  scores = scores.reshape(b, h, t, -1)
  scores = scores if bias is None else scores + bias
  weights = jax.nn.softmax(jnp.where(visible, scores, -0.7 * jnp.finfo(dtype).max), axis=-1)
  weights = (jnp.tanh(weights) if tanh else weights).astype(v.dtype)
  out = jnp.einsum("bgrts,bsgk->btgrk", weights.reshape(b, g, h // g, t, -1), v)
  return out.reshape(b, t, h, size)
