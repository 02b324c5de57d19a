"""Token-wise feed-forward layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import Initializer

from .gate import GATES
from .linear import Linear


@jax.custom_vjp
def squared_relu(x: jax.Array) -> jax.Array:
  """`max(x, 0)^2` (Primer, arXiv 2109.08668). Differentiable in reverse mode only."""
  return jnp.square(jnp.maximum(x, 0))


def _forward(x):
  positive = jnp.maximum(x, 0)
  return jnp.square(positive), positive


squared_relu.defvjp(_forward, lambda positive, dy: (2 * positive * dy,))


@jax.custom_vjp
def squared_relu_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`squared_relu(x) kernel`, for whose gradient `max(x, 0)` alone is kept of the wide values."""
  return jnp.tensordot(squared_relu(x), kernel, axes=1)


def _product_forward(x, kernel):
  positive = jnp.maximum(x, 0)
  return jnp.tensordot(jnp.square(positive), kernel, axes=1), (positive, kernel)


def _product_backward(residuals, dy):
  positive, kernel = residuals
  tokens = tuple(range(dy.ndim - 1))
  dx = 2 * positive * jnp.tensordot(dy, kernel, axes=((dy.ndim - 1,), (1,)))
  return dx, jnp.tensordot(jnp.square(positive), dy, axes=(tokens, tokens))


squared_relu_product.defvjp(_product_forward, _product_backward)

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "squared_relu": squared_relu,
}


class FeedForward(nnx.Module):
  """`W_out act(W_in x + b_in) + b_out`; `output_bias` is as `use_bias` by default."""

  def __init__(
    self,
    d_model: int,
    hidden: int,
    *,
    activation: str,
    use_bias: bool = True,
    output_bias: bool | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if activation not in ACTIVATIONS:
      raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.activation = activation
    self.input = linear(d_model, hidden, use_bias=use_bias)
    self.output = linear(hidden, d_model, use_bias=use_bias if output_bias is None else output_bias)

  def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> [b, t, d]
    hidden = self.input(x)
    if self.activation == "squared_relu":
      return self.output(hidden, squared_relu_product)
    return self.output(ACTIVATIONS[self.activation](hidden))


class GatedFeedForward(nnx.Module):
  """`W_out(act(W_in x) * W_gate x)` (GLU variants, arXiv 2002.05202), without biases."""

  def __init__(
    self,
    d_model: int,
    hidden: int,
    *,
    activation: str = "silu",
    kernel_init: Initializer | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if activation not in GATES:
      raise ValueError(f"activation is {activation!r}, expected one of {', '.join(GATES)}")
    linear = functools.partial(
      Linear,
      kernel_init=kernel_init or nnx.initializers.lecun_normal(),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.activation = activation
    self.input = linear(d_model, hidden)
    self.gate = linear(d_model, hidden)
    self.output = linear(hidden, d_model)

  def __call__(self, x: jax.Array) -> jax.Array:  # [b, t, d] -> [b, t, d]
    return self.output(GATES[self.activation](self.input(x), self.gate(x)))
