"""The hypernetwork of HyperMixing."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from .feed_forward import ACTIVATIONS

HypernetworkInit = Literal["per_head", "official"]


class HeadLinear(nnx.Module):
  """A linear layer of its own for every head: `[b, t, h, i]` to `[b, t, h, o]`.

  `init="per_head"` is Glorot's for the matrix of a head, with a gain of the square root of 2.
  `"official"` is what HyperMixing's published code draws: it takes the fans of the stack of `h`
  matrices `[h, o, i]`, `o i` and `h i`, and weights are `sqrt((o + h) i / (i + o))` times smaller.
  """

  def __init__(
    self,
    num_heads: int,
    in_size: int,
    out_size: int,
    *,
    use_bias: bool,
    init: HypernetworkInit,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    if init not in get_args(HypernetworkInit):
      raise ValueError(f"init is {init!r}, expected per_head or official")
    fans = in_size + out_size if init == "per_head" else (out_size + num_heads) * in_size
    bound = (2 * 6 / fans) ** 0.5
    shape, dtype_held = (num_heads, in_size, out_size), jnp.dtype(param_dtype)
    self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, dtype_held, -bound, bound))
    self.bias = nnx.Param(jnp.zeros((num_heads, out_size), param_dtype)) if use_bias else None
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jnp.einsum("bthi,hio->btho", x, self.kernel[...].astype(self.dtype))
    return (
      y if self.bias is None else y + self.bias[...].astype(self.dtype).reshape(1, 1, *y.shape[2:])
    )


class Hypernetwork(nnx.Module):
  """A two-layer perceptron for every head's own channels, mixing neither heads nor tokens.

      w_h = B_h gelu(A_h u_h + a_h) + b_h

  (arXiv 2203.03691, section 3.1; heads as in HyperConformer, arXiv 2305.18281.) `[b, t, d]`, of
  which a head has `in_size` channels, to `[b, t, h, out_size]`. See `HeadLinear` for `init`.
  """

  def __init__(
    self,
    num_heads: int,
    in_size: int,
    out_size: int,
    *,
    use_bias: bool = False,
    init: HypernetworkInit = "per_head",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    linear = functools.partial(
      HeadLinear,
      num_heads,
      in_size,
      use_bias=use_bias,
      init=init,
      dtype=self.dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.input, self.output = linear(in_size), linear(out_size)

  def __call__(self, u: jax.Array) -> jax.Array:  # [b, t, d] -> [b, t, h, k]
    u = jnp.asarray(u, self.dtype).reshape(*u.shape[:2], self.input.kernel.shape[-3], -1)
    return self.output(ACTIVATIONS["gelu"](self.input(u)))
