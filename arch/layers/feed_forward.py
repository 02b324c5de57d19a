"""Token-wise feed-forward layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import Initializer

from .gate import GATES
from .linear import Linear


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
