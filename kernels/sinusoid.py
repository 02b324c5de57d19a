"""Sinusoidal position encoding computed from exact phases, for any number of tokens.

An angle is a 64-bit fraction of a turn and the phase the integer product with the position, so that
nothing is lost however far from the start; see `rotary` for why that matters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TURN = 2**64


def sinusoid(
  position: jax.Array,  # uint32[b, t]
  angles: np.ndarray,  # [d], radians per token
  quarters: np.ndarray,  # int[d], quarter turns ahead: 0 for a sine, 1 for a cosine
  dtype: Any,
) -> jax.Array:  # [b, t, d]
  """`sin(position angle + quarter pi / 2)`, in `dtype`, which is at least float32."""
  turns = np.asarray(angles, np.float64) / (2 * np.pi)
  steps = [round(turn * TURN) % TURN for turn in turns.tolist()]
  high = jnp.asarray(np.array([step >> 32 for step in steps], np.uint32))[None, None]
  low = jnp.asarray(np.array([step % 2**32 for step in steps], np.uint32))[None, None]
  start = jnp.asarray((np.asarray(quarters) % 4 * 2**30).astype(np.uint32))[None, None]
  position, dtype = jnp.asarray(position).astype(jnp.uint32)[..., None], jnp.dtype(dtype)
  phase = position * high + _high_word(position, low) + start
  turn = phase.astype(jnp.int32).astype(dtype)
  if jnp.finfo(dtype).bits > 32:
    turn += (position * low).astype(dtype) * dtype.type(2.0**-32)
  return jnp.sin(turn * dtype.type(2 * np.pi / 2**32))


def _high_word(a: jax.Array, b: jax.Array) -> jax.Array:
  """The upper 32 bits of the product of unsigned 32-bit integers."""
  a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
  outer, inner = a1 * b0, a0 * b1
  carry = (a0 * b0 >> 16) + (outer & 0xFFFF) + (inner & 0xFFFF)
  return a1 * b1 + (outer >> 16) + (inner >> 16) + (carry >> 16)
