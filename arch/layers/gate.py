"""Gates: one image of a token decides how much of another passes."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def silu_gate(a: jax.Array, b: jax.Array) -> jax.Array:
  """`silu(a) b = a b / (1 + exp(-a))`, in at least float32; returned in the dtype of `a`.

  With the division last, XLA for CPU computes the product once, where it repeated `silu(a) b` for
  the forward pass and for the gradient of the weights that it is multiplied by. Differentiable in
  reverse mode only.
  """
  dtype, a, b = a.dtype, _wide(a), _wide(b)
  return (a * b / (1 + jnp.exp(-a))).astype(dtype)


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _forward(a, b):
  return silu_gate(a, b), (a, b)


def _backward(residuals, dy):
  a, b = residuals
  wide_a, dy, open_part = _wide(a), _wide(dy), jax.nn.sigmoid(_wide(a))
  silu = wide_a * open_part
  d_a = dy * _wide(b) * (open_part + silu * (1 - open_part))
  return d_a.astype(a.dtype), (dy * silu).astype(b.dtype)


silu_gate.defvjp(_forward, _backward)

# What a gated layer multiplies, by the name of its activation.
GATES = {
  "gelu": lambda a, b: jax.nn.gelu(a, approximate=False) * b,
  "relu": lambda a, b: jax.nn.relu(a) * b,
  "silu": silu_gate,
}
