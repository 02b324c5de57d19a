"""Linear layers with batch normalisation behind them, which inference can do without."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .batch_norm import BatchNorm
from .linear import Linear

# In +-1 / sqrt(fan_in), what PyTorch draws for convolutions.
uniform_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class NormedLinear(nnx.Module):
  """`BatchNorm(W x + b)`, where `make_linear` makes the layer of the product."""

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    kernel_init: Any,
    make_linear: Callable[..., nnx.Module] = Linear,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    self.linear = make_linear(
      in_features, out_features, use_bias=use_bias, kernel_init=kernel_init, **dtypes, rngs=rngs
    )
    self.norm = nnx.data(BatchNorm(out_features, **dtypes))

  def __call__(self, x, *, mask=None, rngs=None):  # [b, t, i] -> [b, t, o]
    return self.normalise(self.linear(x), mask=mask, rngs=rngs)

  def normalise(self, y, *, mask=None, rngs=None):  # [b, t, o] -> [b, t, o]
    return y if self.norm is None else self.norm(y, mask=mask, rngs=rngs)

  def fold(self) -> None:
    """Takes the norm, as evaluation computes it, into `W` and `b`."""
    norm, linear = self.norm, self.linear
    gain = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    before = 0 if linear.bias is None else linear.bias[...]
    bias = (before - norm.mean[...]) * gain + norm.bias[...]
    kernel = linear.kernel[...]
    linear.kernel[...] = (kernel * gain[..., None, :]).astype(kernel.dtype)
    linear.bias = nnx.Param(bias.astype(kernel.dtype))
    self.norm = nnx.data(None)


def fold_batch_norm(model: nnx.Module) -> nnx.Module:
  """A copy of `model` for inference, without the batch norms that follow a linear layer directly.

      BatchNorm(W x + b) = W g x + (b - mean) g + bias,   g = scale / sqrt(var + epsilon)

  Convolutions are linear layers of a window here, and their zero padding comes before them, so
  theirs fold exactly too; a norm behind an activation, before a layer, or of more features than the
  kernel has outputs (`FrequencyConv`), stays. The copy does not train as the model does.
  """
  model = nnx.clone(model)
  for _, module in list(nnx.iter_graph(model)):
    foldable = isinstance(module, NormedLinear) and isinstance(module.linear, Linear)
    if foldable and module.norm is not None:
      module.fold()
  return model
