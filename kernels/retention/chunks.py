"""What both kernels of retention do around their launches."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..runs import pad_to_runs


def in_chunks(c: int, q, k, v, log_decay, state, reset, mask):
  """Whole chunks of `c` tokens, and what the weights of `..runs` are made of.

  Returns q, k, v; the rate, float32 `[h]`, or `None` for a decay per token; exponents, float32
  `[b, n c, 1]`, which the rate is multiplied with, or `[b, n c, h]` without a rate, or `None` where
  every token counts; the documents begun, float32 `[b, n c, 1]`, or `None`; the state, float32; the
  mask. Sums are within chunks.
  """
  b, _, h, size = q.shape
  state = jnp.zeros((b, h, size, v.shape[-1])) if state is None else state
  rate = log_decay.astype(jnp.float32)
  per_token = () if rate.ndim == 1 else (rate,)
  reset, mask, q, k, v, *per_token = pad_to_runs(c, reset, mask, q, k, v, *per_token)
  exponent = segment = None
  if per_token:
    rate, exponent = None, _running_sums(c, per_token[0])
  elif mask is not None:
    exponent = _running_sums(c, mask[..., None])
  if reset is not None:
    segment = _running_sums(c, (reset if mask is None else reset & mask)[..., None])
  return q, k, v, rate, exponent, segment, state.astype(jnp.float32), mask


def _running_sums(c, a):
  b, t, h = a.shape
  return jnp.cumsum(a.reshape(b, -1, c, h).astype(jnp.float32), axis=2).reshape(b, t, h)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which gradients are asked for: known when the backward pass is traced, so part of no array."""

  decays: bool  # those of the rate or the exponent


def primals(q, k, v, rate, exponent, segment, state):
  """Arrays and `Wanted` of the arguments of a forward rule with `symbolic_zeros`."""
  decays = any(a.perturbed for a in (rate, exponent) if a is not None)
  args = (q, k, v, rate, exponent, segment, state)
  return jax.tree.map(lambda a: a.value, args), Wanted(decays)


def written_out(cotangents):
  """Those of a backward rule with `symbolic_zeros`, as arrays."""
  return [jnp.zeros(a.shape, a.dtype) if isinstance(a, SymbolicZero) else a for a in cotangents]
