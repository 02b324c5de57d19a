"""Functions like retention on a GPU: of this library, of JAX and of others that are installed.

Each takes `[b, t, h, size]` and gives outputs, or outputs and the gradients of q, k and v; decays
are constants. `jax-linear-attention` 0.1.0 and `fla` 0.6.0 (`fla-core` and PyTorch) are measured
where they can be imported. The former (for JAX 0.11.2, Python 3.12) knows decays per token alone,
and computes their gradient.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from triform import kernels
from triform.kernels.retention.specs import Shape

LARGEST_PAIRS = 20e9  # bytes: float32 weights of all pairs of tokens, for the parallel form
LARGEST_ATTENTION = 256  # columns of a head, of cuDNN on Hopper GPUs


class Program(NamedTuple):
  """`wait(start())` ends when the result is there; calls may be started one after another."""

  start: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready


def log_decays(h: int) -> jax.Array:
  """The paper's, equation 8."""
  return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(h))))


def inputs(shape: Shape, dtype: str = "bfloat16") -> list[jax.Array]:
  """q, k, v and the gradient of outputs, numbers that are exact in bfloat16."""
  b, t, h, k, v = shape
  sizes = (k, k, v, v)
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [
    jax.random.normal(key, (b, t, h, size), "bfloat16") / 4
    for key, size in zip(keys, sizes, strict=True)
  ]
  return [a.astype(dtype) for a in arrays]


def program(function: Callable, arrays, backward: bool) -> Program:
  """`function(q, k, v)`, with its gradients if `backward`."""

  def both(q, k, v, d_o):
    o, gradients = jax.vjp(function, q, k, v)
    return o, gradients(d_o)

  f = jax.jit(both if backward else function)
  arguments = arrays if backward else arrays[:3]
  return Program(lambda: f(*arguments))


def ours(arrays, backward: bool, **options) -> Program:
  decays = log_decays(arrays[0].shape[2])
  return program(lambda *heads: kernels.retention(*heads, decays, **options)[0], arrays, backward)


def cudnn(arrays, backward: bool) -> Program:
  attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  return program(attend, arrays, backward)


def jax_linear_attention(arrays, backward: bool) -> Program:
  from jla.ops import linear_attention

  decays = jnp.broadcast_to(log_decays(arrays[0].shape[2]), arrays[0].shape[:3])
  options = {"g": decays, "scale": 1.0, "impl": "mosaic_gpu"}
  return program(
    lambda *heads: linear_attention("simple_gla", *heads, **options)[0], arrays, backward
  )


def fla(arrays, backward: bool) -> Program:
  import torch
  from fla.ops.simple_gla import chunk_simple_gla

  *heads, d_o = (
    torch.randn(a.shape, device="cuda", dtype=torch.bfloat16).div_(4).requires_grad_(backward)
    for a in arrays
  )
  h = heads[0].shape[2]
  decays = torch.log1p(-(2.0 ** (-5.0 - torch.arange(h, device="cuda", dtype=torch.float32))))

  def forward():
    return chunk_simple_gla(*heads, g_gamma=decays, scale=1.0)[0]

  def both():
    o = forward()
    return o, torch.autograd.grad(o, heads, d_o.detach())

  return Program(both if backward else forward, lambda result: torch.cuda.synchronize())


def of(shape: Shape) -> dict[str, Callable[..., Program]]:
  """What is measured at a shape, by name: `program = functions[name](arrays, backward)`."""
  b, t, h, k, v = shape
  functions = {
    "gpu": functools.partial(ours, implementation="gpu"),
    "xla 64": functools.partial(ours, implementation="xla", chunk_size=64),
    "xla 128": functools.partial(ours, implementation="xla", chunk_size=128),
  }
  if 4 * b * h * t**2 <= LARGEST_PAIRS:
    functions["xla parallel"] = functools.partial(ours, implementation="xla", form="parallel")
  if k == v <= LARGEST_ATTENTION:
    functions["attention (cudnn)"] = cudnn
  if importlib.util.find_spec("jla") is not None:
    functions["jax-linear-attention"] = jax_linear_attention
  if all(importlib.util.find_spec(name) is not None for name in ("torch", "fla")):
    functions["fla"] = fla
  return functions
