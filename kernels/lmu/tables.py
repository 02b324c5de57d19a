"""The Legendre system, discretised, as tables that the forms are made of.

For order n and a window of theta steps (Voelker et al. 2019, equations 1 and 2),

    A_ij = (2i + 1) / theta (-1 if i < j else (-1)^(i - j + 1))     B_i = (2i + 1) / theta (-1)^i

    zero-order hold   Abar = exp(A)    Bbar = A^-1 (Abar - I) B = e0 - Abar e0, as A^-1 B = -e0
    Euler             Abar = I + A     Bbar = B

A fixed theta has its tables in float64, by NumPy, rounded once. Those of a theta that is learned
are computed where it is, and have derivatives in closed form, since A goes with 1 / theta and
commutes with Abar:

    d Abar^k / d theta = -(k / theta) A Abar^k     with Euler's method   -(k / theta) A Abar^(k-1)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg


class Tables:
  """Tables of one system in one dtype: of a number `theta`, or of an array that is learned."""

  def __init__(self, order: int, theta: Any, discretizer: str, dtype: jnp.dtype):
    self.order, self.discretizer, self.dtype = order, discretizer, dtype
    self.theta = theta if isinstance(theta, float) else jnp.asarray(theta, dtype)

  def powers(self, count: int):  # [count + 1, n, n]
    """`Abar^k` for k up to `count`."""
    if isinstance(self.theta, float):
      return _fixed_powers(self.order, self.theta, self.discretizer, count, self.dtype)
    return _learned_powers(self.theta, self.order, self.discretizer, count)

  def impulse_response(self, length: int):  # [length, n]
    """`H_k = Abar^k Bbar`, the memory k steps after an input of 1."""
    if isinstance(self.theta, float):
      return _fixed_impulse_response(self.order, self.theta, self.discretizer, length, self.dtype)
    if self.discretizer == "euler":
      return _learned_orbit(self.theta, self.order, "euler", length) / self.theta
    orbit = _learned_orbit(self.theta, self.order, "zoh", length + 1)
    return orbit[:-1] - orbit[1:]


def system(order: int) -> tuple[np.ndarray, np.ndarray]:  # [n, n], [n]
  """`theta A` and `theta B`."""
  i, j = np.arange(order)[:, None], np.arange(order)[None]
  a = (2.0 * i + 1) * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
  return a, (2.0 * i[:, 0] + 1) * (-1.0) ** i[:, 0]


def _start(order: int, discretizer: str) -> np.ndarray:  # [n]
  """The vector whose orbit gives the impulse response: `e0`, or with Euler's method `theta B`."""
  return system(order)[1] if discretizer == "euler" else np.eye(order)[0]


def _powers(first, count: int, concatenate):
  """The powers of a matrix up to `count`, by doubling."""
  powers = np.eye(len(first))[None].astype(first.dtype)
  while len(powers) <= count:
    powers = concatenate([powers, powers @ (powers[-1] @ first)])
  return powers[: count + 1]


def _orbit(first, start, length: int, concatenate):  # [length, n]
  """`first^k start` for k below `length`, by doubling."""
  orbit, power = start[None], first
  while len(orbit) < length:
    orbit = concatenate([orbit, orbit @ power.T])
    power = power @ power
  return orbit[:length]


@functools.lru_cache(maxsize=32)
def transition(order: int, theta: float, discretizer: str) -> np.ndarray:  # [n, n]
  """`Abar` in float64."""
  a = system(order)[0] / theta
  return np.eye(order) + a if discretizer == "euler" else scipy.linalg.expm(a)


@functools.lru_cache(maxsize=8)
def _fixed_powers(order, theta, discretizer, count, dtype):
  abar = transition(order, theta, discretizer)
  return _powers(abar, count, np.concatenate).astype(dtype)


@functools.lru_cache(maxsize=8)
def _fixed_impulse_response(order, theta, discretizer, length, dtype):
  abar, start = transition(order, theta, discretizer), _start(order, discretizer)
  if discretizer == "euler":
    return (_orbit(abar, start / theta, length, np.concatenate)).astype(dtype)
  orbit = _orbit(abar, start, length + 1, np.concatenate)
  return (orbit[:-1] - orbit[1:]).astype(dtype)


@jax.default_matmul_precision("highest")
def _learned_transition(theta, order, discretizer):
  a = system(order)[0]
  if discretizer == "euler":
    return jnp.eye(order, dtype=theta.dtype) + a.astype(theta.dtype) / theta
  # In the basis m_i / sqrt(2i + 1) every power is a contraction, so rounding is not amplified.
  scale = np.sqrt(2.0 * np.arange(order) + 1)
  normal = (a * scale[None] / scale[:, None]).astype(theta.dtype)
  largest = 24 + math.ceil(math.log2(order))  # squarings: theta down to a thousandth
  exponential = jax.scipy.linalg.expm(normal / theta, max_squarings=largest)
  return exponential * (scale[:, None] / scale[None]).astype(theta.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
@jax.default_matmul_precision("highest")
def _learned_powers(theta, order, discretizer, count):
  return _powers(_learned_transition(theta, order, discretizer), count, jnp.concatenate)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
@jax.default_matmul_precision("highest")
def _learned_orbit(theta, order, discretizer, length):
  start = _start(order, discretizer).astype(theta.dtype)
  return _orbit(_learned_transition(theta, order, discretizer), start, length, jnp.concatenate)


@_learned_powers.defjvp
def _(order, discretizer, count, primals, tangents):
  powers = _learned_powers(*primals, order, discretizer, count)
  return powers, _slope(*primals, order, discretizer, powers) * tangents[0]


@_learned_orbit.defjvp
def _(order, discretizer, length, primals, tangents):
  orbit = _learned_orbit(*primals, order, discretizer, length)
  return orbit, _slope(*primals, order, discretizer, orbit[..., None])[..., 0] * tangents[0]


@jax.default_matmul_precision("highest")
def _slope(theta, order, discretizer, table):
  """The derivative by theta of `Abar^k X`, [k, n, ...], see the module's docstring."""
  a = system(order)[0].astype(theta.dtype) / theta
  steps = np.arange(len(table), dtype=theta.dtype)[:, None, None]
  if discretizer == "euler":
    table = jnp.concatenate([table[:1], table[:-1]])  # k is 0 at the first
  return -steps / theta * (a @ table)
