"""Modules under the laws, and their compiled programs.

A `Subject` is what the laws need to know about a module; a `Bench` runs one in one dtype. What
varies freely from example to example is data (values, resets, masks, where to cut, which form);
shapes come from a short list, because compiling is what takes the time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform.arch.interface import SequenceModule, state_dtype

BATCH, LENGTH = 2, 7  # with chunks of 4 tokens: one whole, one ragged
SIMPLEST = "recurrent"


def vectors(width: int) -> Callable:
  """Inputs `[b, t, width]`."""
  return lambda rng, b, t: rng.normal(size=(b, t, width))


def distinct_ids(vocab_size: int) -> Callable:
  """Token ids `[b, t]`, no two alike: a row of the table then belongs to one token."""
  return lambda rng, b, t: rng.permutation(vocab_size)[: b * t].reshape(b, t)


@dataclasses.dataclass(frozen=True)
class Subject:
  """What the laws need to know about a module.

  Attributes:
    name: appears in the names of the tests.
    make: `make(dtype=, param_dtype=, rngs=)`, a small module; its chunks should have 4 tokens.
    inputs: `inputs(rng, b, t)`, in float64 or integers.
    table: for a model of token ids, the embedding `[vocab, d]` among its parameters (a pure
      dictionary); `inputs` must then be `distinct_ids` of at least `BATCH * LENGTH`.
    trains: it has dropout or batch statistics, so that the laws of training apply.
    causal: it goes on from a state; otherwise it sees whole sequences.
    spikes: its outputs jump where rounding moves a potential over its threshold, so that in narrow
      dtypes only the laws hold that are about the same bits.
    slow: its tests are marked so: another subject stands for its architecture in the quick suite.
    kernel: its chunkwise form is a kernel's, which has laws of its own (`test_laws_kernels.py`).
    oracle: `oracle(variables, x, state, reset, mask) -> (y, state)` in float64 NumPy, if there is
      one; `variables` is a pure dictionary.
  """

  name: str
  make: Callable[..., SequenceModule]
  inputs: Callable[[np.random.Generator, int, int], np.ndarray]
  table: Callable[[dict], np.ndarray] | None = None
  trains: bool = False
  causal: bool = True
  spikes: bool = False
  slow: bool = False
  kernel: bool = False
  oracle: Callable | None = None


SUBJECTS: dict[str, Subject] = {}


def register(name: str, make: Callable, inputs: Callable, **options: Any) -> None:
  SUBJECTS[name] = Subject(name, make, inputs, **options)


class Case(NamedTuple):
  """One example, the same for every dtype: its numbers are exact in bfloat16 and float32."""

  x: np.ndarray
  state: Any  # float64
  reset: np.ndarray
  mask: np.ndarray


class Outcome(NamedTuple):
  """What a call returns, and gradients of a fixed linear function of it."""

  y: jax.Array
  state: Any
  statistics: Any
  parameters: Any
  inputs: np.ndarray
  incoming: Any


class Bench:
  """A subject in one dtype, with its compiled programs."""

  def __init__(self, subject: Subject, dtype: str):
    self.subject, self.dtype = subject, jnp.dtype(dtype)
    with self.context():
      self.graphdef, *abstract = _abstract(subject, self.dtype)
      self.params, self.rest = jax.tree.map(
        lambda spec, value: jnp.asarray(value, spec.dtype), tuple(abstract), _values(subject)
      )
    compiled = functools.partial(jax.jit, static_argnames="form")
    self._call, self._trial = compiled(self._call), compiled(self._trial)

  def context(self):
    return jax.enable_x64(self.dtype == jnp.float64)

  def variables(self) -> dict:
    """Parameters and the rest as one pure dictionary of float64 arrays."""
    merged = nnx.to_pure_dict(nnx.merge_state(self.params, self.rest))
    return jax.tree.map(widen, merged)

  def module(self) -> SequenceModule:
    return nnx.merge(self.graphdef, self.params, self.rest)

  def init_state(self, b: int = BATCH) -> Any:
    with self.context():
      return self.module().init_state(b)

  def cast_state(self, state: Any) -> Any:
    """A float64 state in the dtypes this one's have."""
    rows = [leaf.shape[0] for leaf in jax.tree.leaves(state)]
    specs = self.init_state(*rows[:1])
    return jax.tree.map(lambda spec, a: np.asarray(a, spec.dtype), specs, state)

  def call(self, x, state, *, form, reset=None, mask=None):
    """Outputs and state, for any length; absent arguments stay absent."""
    with self.context():
      return self._call(self.params, self.rest, self._inputs(x), state, reset, mask, form=form)

  def trial(self, case: Case, form: str, *, weights=None, state_weight=1.0, key=None) -> Outcome:
    """Everything about a call of `LENGTH` tokens; `weights` [b, t] of outputs in the loss."""
    weights = case.mask if weights is None else weights
    with self.context():
      y, state, statistics, (parameters, inputs, incoming) = self._trial(
        self.params,
        self.rest,
        self._inputs(case.x),
        self.cast_state(case.state),
        case.reset,
        case.mask,
        np.asarray(weights, np.float32),
        np.float32(state_weight),
        key,
        form=form,
      )
      parameters = nnx.to_pure_dict(parameters)
    if self.subject.table is not None:
      inputs = self.subject.table(parameters)[case.x]
    return Outcome(y, state, statistics, parameters, widen(inputs), floats(incoming))

  def _inputs(self, x):
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(self.dtype)

  def _call(self, params, rest, x, state, reset, mask, *, form):
    module = nnx.merge(self.graphdef, params, rest)
    return module(x, state, form=form, reset=reset, mask=mask)

  def _trial(self, params, rest, x, state, reset, mask, weights, state_weight, key, *, form):
    def loss(params, x, state):
      # A copy: variables made outside the gradient's trace could not be written in it.
      module = nnx.merge(self.graphdef, params, jax.tree.map(lambda a: a, rest))
      rngs = None if key is None else nnx.Rngs(key)
      y, after = module(x, state, form=form, reset=reset, mask=mask, rngs=rngs)
      wide = state_dtype(self.dtype)
      per_token = weights.astype(wide).reshape(*weights.shape, *[1] * (y.ndim - 2))
      total = jnp.sum(y.astype(wide) * _pattern(y) * per_token)
      for leaf in floats(after):
        total += state_weight.astype(wide) * jnp.sum(leaf.astype(wide) * _pattern(leaf))
      return total, (y, after, nnx.state(module, nnx.BatchStat))

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)
    gradients, (y, after, statistics) = gradient(params, x, state)
    return y, after, statistics, gradients


@functools.lru_cache(maxsize=4)
def bench(name: str, dtype: str) -> Bench:
  return Bench(SUBJECTS[name], dtype)


def _abstract(subject, dtype):
  graphdefs = []

  def make():
    module = subject.make(dtype=dtype, param_dtype=state_dtype(dtype), rngs=nnx.Rngs(0))
    graphdef, *variables = nnx.split(module, nnx.Param, ...)
    graphdefs.append(graphdef)
    return tuple(variables)

  variables = jax.eval_shape(make)
  return graphdefs[0], *variables


@functools.lru_cache(maxsize=1)
def _values(subject):
  """Values of the variables in float32, shaken so that no weight is left at its initial 0 or 1."""

  def make():
    module = subject.make(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    return tuple(nnx.split(module, nnx.Param, ...)[1:])

  params, rest = jax.jit(make)()
  rng = np.random.default_rng(0)
  shaken = jax.tree.map(lambda a: np.float32(a + 0.1 * rng.normal(size=a.shape)), params)
  return shaken, rest


def _pattern(like):
  """Coefficients of a loss, exact in every dtype."""
  values = (np.arange(like.size) * 37 % 17 - 8) / 8
  return jnp.asarray(values.reshape(like.shape), state_dtype(like.dtype))


def widen(a):
  a = np.asarray(a)
  return a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def floats(tree: Any) -> list:
  return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
