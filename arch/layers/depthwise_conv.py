"""Depthwise convolution over time as a layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from triform import kernels


class DepthwiseConv(nnx.Module):
  """Every channel's own weights of a token and the ones before it in the document.

  They start as 0.5 for the token and `0.5 / num_taps` for the others, as in Primer (arXiv
  2109.08668). What it carries between calls is the last inputs, `[b, num_taps - 1, d]`.
  """

  def __init__(
    self,
    features: int,
    num_taps: int,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
  ):
    if num_taps < 1:
      raise ValueError(f"num_taps is {num_taps}, expected at least 1")
    self.features, self.num_taps = features, num_taps
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    start = [0.5, *[0.5 / num_taps] * (num_taps - 1)]
    column = jnp.asarray(start, param_dtype)[:, None]
    self.taps = nnx.Param(jnp.broadcast_to(column, (num_taps, features)))

  def init_tail(self, batch_size: int) -> jax.Array:
    return jnp.zeros((batch_size, self.num_taps - 1, self.features), self.dtype)

  def __call__(self, x, tail=None, *, reset=None, mask=None):  # [b, t, d] -> [b, t, d], the tail
    return kernels.causal_depthwise_conv(
      x, self.taps[...].astype(self.dtype), tail=tail, reset=reset, mask=mask
    )
