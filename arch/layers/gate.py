"""Gates: one image of a token decides how much of another passes."""

import jax
import jax.numpy as jnp


def silu_gate(a: jax.Array, b: jax.Array) -> jax.Array:
  """`silu(a) b = a b / (1 + exp(-a))`, in at least float32; returned in the dtype of `a`.

  With the division last, XLA for CPU computes the product once, where it repeated `silu(a) b` for
  the forward pass and for the gradient of the weights that it is multiplied by. Differentiable in
  reverse mode only.
  """
  dtype = jnp.promote_types(a.dtype, jnp.float32)
  return _silu_gate(a.astype(dtype), b.astype(dtype)).astype(a.dtype)


@jax.custom_vjp
def _silu_gate(a, b):
  return a * b / (1 + jnp.exp(-a))


def _forward(a, b):
  return _silu_gate(a, b), (a, b)


def _backward(residuals, dy):
  a, b = residuals
  open_part = jax.nn.sigmoid(a)
  silu = a * open_part
  return dy * b * (open_part + silu * (1 - open_part)), dy * silu


_silu_gate.defvjp(_forward, _backward)


# What a gated layer multiplies, by the name of its activation.
GATES = {
  "gelu": lambda a, b: jax.nn.gelu(a, approximate=False) * b,
  "relu": lambda a, b: jax.nn.relu(a) * b,
  "silu": silu_gate,
}
