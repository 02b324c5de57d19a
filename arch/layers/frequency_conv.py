"""Convolutions that share their weights over frequency as well as over time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .linear import Linear


class FrequencyConv(nnx.Module):
  """A convolution over all frames of a window and `width` bins, at every second bin.

      y[j, o] = sum over frames f, bins i of a window, channels c of W[i, f, c, o] x[f, 2 j + i, c]

  with zeros beside the first and last bins, windows being centred. Inputs are a window of frames,
  each all channels of its first bin, then of the second; so is the output, `ceil(bins / 2)` bins.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    frames: int,
    bins: int,
    width: int,
    use_bias: bool,
    kernel_init: Any,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.in_features, self.out_features = in_features, out_features
    self.frames, self.bins, self.width = frames, bins, width
    channels = in_features // (frames * bins)
    self.linear = Linear(
      width * frames * channels,
      out_features // halved(bins),
      use_bias=use_bias,
      kernel_init=kernel_init,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:  # [..., in] -> [..., out]
    shape, side, bins = x.shape[:-1], self.width // 2, halved(self.bins)
    x = x.reshape(*shape, self.frames, self.bins, -1).swapaxes(-3, -2)
    x = x.reshape(*shape, self.bins, -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(side, side), (0, 0)])
    seen = [x[..., i : i + 2 * bins - 1 : 2, :] for i in range(self.width)]
    return self.linear(jnp.concatenate(seen, axis=-1)).reshape(*shape, self.out_features)


def halved(bins: int) -> int:
  """Every second bin, from the first on."""
  return -(-bins // 2)
