"""Rotary position embedding with exact phases.

A float32 product `position * angle` is off by 0.02 rad at a million tokens. Here an angle is a
32-bit fraction of a turn, `step = round(angle / 2pi * 2**32)`, and the phase is the integer
product `position * step`, which wraps at a whole turn exactly as an angle does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

TURN = 2**32


def rotary_steps(
  angles: np.ndarray,  # [k/2], radians per token
) -> np.ndarray:  # uint32[k/2]
  """Converts angles to 32-bit fractions of a turn per token."""
  turns = np.asarray(angles, np.float64) / (2 * np.pi)
  return (np.rint(turns * TURN).astype(np.int64) % TURN).astype(np.uint32)


def rotary_phase(
  position: jax.Array,  # uint32[b, t]
  steps: jax.Array,  # uint32[k/2]
) -> jax.Array:  # uint32[b, t, k/2]
  """Phase of every token and frequency, in units of 2**-32 turns."""
  return position[..., None] * steps[None, None, :]


def rotate(
  x: jax.Array,  # [b, t, h, k]
  phase: jax.Array,  # uint32[b, t, k/2]
) -> jax.Array:  # [b, t, h, k]
  """Rotates the pairs (i, i + k/2) of the last axis by `phase`: x e^{i n theta} of RoFormer 3.2.2.

  Computed in at least float32 and returned in the dtype of `x`.
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)

  def sine(phase):
    return jnp.sin(phase.astype(jnp.int32).astype(dtype) * dtype.type(2 * np.pi / TURN))

  # XLA for CPU would compute them again for every head, half and layer that reads them, but for a
  # loop, which it leaves alone.
  phases = jnp.stack([phase + np.uint32(TURN // 4), phase])[:, :, :, None]
  cos, sin = jax.lax.platform_dependent(
    phases, cpu=functools.partial(jax.lax.map, sine), default=sine
  )
  first, second = jnp.split(x.astype(dtype), 2, axis=-1)
  rotated = (first * cos - second * sin, first * sin + second * cos)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
