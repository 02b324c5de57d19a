"""Batch normalisation over tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from triform.kernels.checks import check_shapes

from ..interface import state_dtype


class BatchNorm(nnx.Module):
  """`y = scale (x - mean) / sqrt(var + epsilon) + bias` of every feature (arXiv 1502.03167).

  In training mean and variance are those of all real tokens of the call, and they enter the running
  ones, by which evaluation normalises:

      running = momentum running + (1 - momentum) new

  As in PyTorch the variance that normalises is `sum (x - mean)^2 / n` and the one that enters
  divides by `n - 1` (it is 0 for a single token). `nnx.BatchNorm` keeps the former, in float32.
  Statistics are in at least float32. No gradient flows through the running ones.
  """

  def __init__(
    self,
    features: int,
    *,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
  ):
    self.features, self.momentum, self.epsilon = features, momentum, epsilon
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    self.scale = nnx.Param(jnp.ones(features, param_dtype))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype))
    self.mean = nnx.BatchStat(jnp.zeros(features, state_dtype(param_dtype)))
    self.var = nnx.BatchStat(jnp.ones(features, state_dtype(param_dtype)))

  def __call__(self, x, *, mask=None, rngs=None):
    """Normalises `[b, t, d]`.

    Args:
      x: inputs.
      mask: bool `[b, t]`, false at padding, which does not count, whatever it holds. The output
        there is finite and unspecified.
      rngs: given means training, when the statistics of the call are used and kept. A call without
        a real token leaves the running ones alone.

    Returns:
      Outputs `[b, t, d]` in the dtype of the layer.

    Raises:
      ValueError: for shapes that do not fit.
    """
    x = jnp.asarray(x)
    if x.ndim != 3 or x.shape[-1] != self.features:
      raise ValueError(f"x has shape {list(x.shape)}, expected [batch, time, {self.features}]")
    check_shapes(f"x {list(x.shape)}", {"mask": (mask, {x.shape[:2]})})
    real = jnp.ones((*x.shape[:2], 1), bool) if mask is None else mask[..., None]
    x = jnp.where(real, x, 0).astype(state_dtype(x.dtype))
    if rngs is None:
      mean, var = self.mean[...], self.var[...]
    else:
      mean, var = self._batch_statistics(x, real)
    scale, bias, mean, var = (
      a.astype(x.dtype)[None, None] for a in (self.scale[...], self.bias[...], mean, var)
    )
    y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
    return y.astype(self.dtype)

  def _batch_statistics(self, x, real):
    count = real.sum().astype(x.dtype)
    mean = x.sum(axis=(0, 1)) / jnp.maximum(count, 1)
    squares = jnp.square(jnp.where(real, x - mean[None, None], 0)).sum(axis=(0, 1))
    unbiased = squares / jnp.maximum(count - 1, 1)
    for running, new in ((self.mean, mean), (self.var, unbiased)):
      old, new = running[...], jax.lax.stop_gradient(new)
      mixed = self.momentum * old + (1 - self.momentum) * new.astype(old.dtype)
      running[...] = jnp.where(count > 0, mixed, old)
    return mean, squares / jnp.maximum(count, 1)
