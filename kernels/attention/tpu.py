"""Splash attention, JAX's own Pallas kernel for TPUs: causal, windows, segments, grouped heads."""

import functools

import jax
import jax.numpy as jnp

from ..sharding import divided

BLOCK = 512  # tokens of queries and of keys at a time, or the largest divisor below
LANES = 128


def supports(q: jax.Array) -> bool:
  """Whether the kernel takes self-attention with such queries."""
  t, size = q.shape[1], q.shape[-1]
  return t % LANES == 0 and size % (LANES // 2) == 0 and q.dtype in (jnp.float32, jnp.bfloat16)


def attention(
  q: jax.Array,  # [b, t, h, k]
  k: jax.Array,  # [b, t, g, k]
  v: jax.Array,  # [b, t, g, k]
  segments: jax.Array | None,  # int32[b, t], tokens see their own segment
  *,
  window: int | None,
  scale: float,
) -> jax.Array:  # [b, t, h, k]
  """Causal self-attention, the batch divided as the mesh in scope divides it."""
  one = functools.partial(_attention, window=window, scale=scale)
  on_all = divided(one, ("bth", "bth", "bth", "bt"), "bth", rows=q.shape[0], heads=k.shape[2])
  return on_all(q, k, v, segments)


def _attention(q, k, v, segments, *, window, scale):
  # Not at the top: Pallas takes long to import, and few need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  t, h = q.shape[1:3]
  mask = masks.CausalMask((t, t))
  if window is not None:
    mask = masks.LocalMask((t, t), (window - 1, 0), 0)
  block = next(size for size in (BLOCK, 256, LANES) if t % size == 0)
  names = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv"),
    *("block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
  )
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * h),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
  )
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * jnp.asarray(scale, q.dtype), k, v))
  ids = None if segments is None else kernels.SegmentIds(segments, segments)
  return jnp.swapaxes(jax.vmap(kernel)(q, k, v, ids), 1, 2)
