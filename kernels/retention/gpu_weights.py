"""The weights of a chunk of `gpu`, in the register layouts of its products."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_plan import CHUNK

MASKED = -math.inf
WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # a vector with one element per row of a WGMMA array
COLUMNS = WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of `..runs` in a chunk. Exponents are to base 2, by way of `rate`."""

  reverse: bool
  rate: jax.Array  # scalar
  exponent: object = None  # loads `A / rate` in the layout it is given
  segment: object = None
  final: jax.Array | None = None  # `A / rate` of the last token
  last: jax.Array | None = None  # its document

  def _exponents(self, layout):
    if self.exponent is None:
      count = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout) + 1
      return count.astype(jnp.float32) * self.rate
    return self.exponent(layout) * self.rate

  @property
  def _final(self):
    return self.rate * (CHUNK if self.final is None else self.final)

  def pairs(self):
    """`W`, [c, c]."""
    shape = (CHUNK, CHUNK)
    rows, columns = (
      plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) for axis in (0, 1)
    )
    if self.exponent is None:
      exponent = (rows - columns).astype(jnp.float32) * self.rate
    else:
      exponent = lax.broadcast_in_dim(self._exponents(ROWS), shape, [0])
      exponent = exponent - lax.broadcast_in_dim(self._exponents(COLUMNS), shape, [1])
    visible = rows <= columns if self.reverse else rows >= columns
    exponent = -exponent if self.reverse else exponent
    if self.segment is not None:
      visible &= lax.broadcast_in_dim(self.segment(ROWS), shape, [0]) == (
        lax.broadcast_in_dim(self.segment(COLUMNS), shape, [1])
      )
    return jnp.exp2(jnp.where(visible, exponent, MASKED))

  def _head(self):
    """Weights of the state before the chunk in its tokens."""
    exponent = self._exponents(ROWS)
    if self.segment is not None:
      exponent = jnp.where(self.segment(ROWS) == 0, exponent, MASKED)
    return jnp.exp2(exponent)

  def _tail(self):
    """Weights of the tokens of the chunk in the state after it."""
    exponent = self._final - self._exponents(ROWS)
    if self.segment is not None:
      exponent = jnp.where(self.segment(ROWS) == self.last, exponent, MASKED)
    return jnp.exp2(exponent)

  def add(self):
    return self._head() if self.reverse else self._tail()

  def history(self, x):
    """`read_i x_i`; 0 where `read_i` is, whatever `x_i` holds."""
    weights = per_row(self._tail() if self.reverse else self._head(), x)
    weighted = weights * x
    return weighted if self.segment is None else jnp.where(weights == 0, 0, weighted)

  def keep(self, state):
    kept = jnp.exp2(self._final) * state
    return kept if self.segment is None else jnp.where(everywhere(self.last == 0, kept), kept, 0)


def load(ref, layout, optimized=True):
  index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before jax 0.12
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def everywhere(scalar, x):
  return lax.broadcast_in_dim(scalar, x.shape, [])


def per_row(vector, x):
  return lax.broadcast_in_dim(vector, x.shape, [0])
