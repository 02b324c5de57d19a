"""The norm of every model."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.RMSNorm):
  """`y = w x / sqrt(mean(x^2) + epsilon)` over the last axis: `nnx.RMSNorm`, but for its gradient.

  It is written out, over tokens as rows: what JAX derives broadcasts and sums in passes of their
  own, which take XLA for CPU a few percent of a training step. Computed in at least float32.
  Differentiable in reverse mode only.
  """

  def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d]
    scale = self.scale[...]
    dtype = jnp.result_type(x, scale) if self.dtype is None else self.dtype
    return _norm(x.reshape(-1, x.shape[-1]), scale, self.epsilon).reshape(x.shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _norm(x, weight, epsilon):
  normed, _ = _normed(x, epsilon)
  return normed * weight.astype(normed.dtype)[None]


def _normed(x, epsilon):
  """`x` of norm 1, and the factor that makes it so."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  factor = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + epsilon)
  return x * factor, factor


def _forward(x, weight, epsilon):
  return _norm(x, weight, epsilon), (x, weight)


def _backward(epsilon, residuals, dy):
  x, weight = residuals
  normed, factor = _normed(x, epsilon)
  weighted = dy * weight.astype(dy.dtype)[None]
  dx = factor * (weighted - normed * jnp.mean(weighted * normed, axis=1, keepdims=True))
  return dx.astype(x.dtype), (dy * normed).sum(axis=0).astype(weight.dtype)


_norm.defvjp(_forward, _backward)
