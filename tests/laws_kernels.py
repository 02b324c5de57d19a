"""Modules whose chunkwise form is a TPU kernel's, interpreted."""

import contextlib
import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
from laws_bench import LENGTH

from triform.arch import SequenceModule
from triform.kernels import implementations
from triform.kernels.retention import tpu

# Two steps of two chunks of 128 tokens: pairs within chunks, and beyond either kind of boundary.
CHUNKS = 2
PLACES = np.array([0, 127, 128, 200, 300, 384, 511])
TOKENS = 512
assert len(PLACES) == LENGTH


@contextlib.contextmanager
def as_on_a_tpu():
  """What leaves the implementation open takes the kernel where it fits."""
  run = implementations.run

  def choose(operator, implementation, *arguments):
    return run(operator, implementation or ("tpu", "xla"), *arguments)

  interpreted = functools.partial(tpu.chunkwise, interpret=True, chunks=CHUNKS)
  with (
    mock.patch.object(implementations, "run", choose),
    mock.patch.object(tpu, "chunkwise", interpreted),
  ):
    yield


class ByKernel(SequenceModule):
  """A module that calls its kernels in the chunkwise form, but in float64, which they do not take.

  The few tokens of a law stand apart in padding that holds something, so that they fall into all
  chunks; a longer call is as it is.
  """

  def __init__(self, module, dtype):
    self.module, self.dtype = module, jnp.dtype(dtype)

  def init_state(self, batch_size, *, max_len=None):
    return self.module.init_state(batch_size)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    if form != "chunkwise" or self.dtype == jnp.float64:
      return self.module(x, state, form=form, reset=reset, mask=mask, rngs=rngs)
    b, t = x.shape[:2]
    if t > LENGTH:
      with as_on_a_tpu():
        return self.module(x, state, form=form, reset=reset, mask=mask, rngs=rngs)
    places = PLACES[:t]
    source = np.searchsorted(places, np.arange(TOKENS), side="right") - 1
    real = np.isin(np.arange(TOKENS), places)
    mask = jnp.ones((b, t), bool) if mask is None else jnp.asarray(mask)
    reset = None if reset is None else jnp.asarray(reset)[:, source]
    x, mask = jnp.asarray(x)[:, source], mask[:, source] & real[None]
    with as_on_a_tpu():
      y, state = self.module(x, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return y[:, places], state
