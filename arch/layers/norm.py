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
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.promote_types(x.dtype, jnp.float32))
    weight = self.scale[...].astype(rows.dtype)
    dtype = jnp.result_type(x, self.scale[...]) if self.dtype is None else self.dtype
    return _norm(rows, weight, self.epsilon).reshape(x.shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _norm(x, weight, epsilon):
  return x * _factor(x, epsilon) * weight[None]


def _factor(x, epsilon):
  return jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + epsilon)


def _forward(x, weight, epsilon):
  return _norm(x, weight, epsilon), (x, weight)


def _backward(epsilon, residuals, dy):
  x, weight = residuals
  factor = _factor(x, epsilon)
  normed = x * factor
  weighted = dy * weight[None]
  dx = factor * (weighted - normed * jnp.mean(weighted * normed, axis=1, keepdims=True))
  return dx, (dy * normed).sum(axis=0)


_norm.defvjp(_forward, _backward)
