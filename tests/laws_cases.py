"""Examples for the laws: hypothesis strategies of data, in shapes from a short list."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws_bench import BATCH, LENGTH, SIMPLEST, SUBJECTS, Case, bench

from triform.arch.interface import FORMS

SHAPES = (  # for law 1, beside a chunk and a bit: one token, three chunks
  (1, 1),
  pytest.param((2, 12), marks=pytest.mark.slow),
)
ALIKE = 3  # cases of one example
PIECES = (1, 5)  # a decoding step, and a ragged piece; each a compiled program per form


def flags(b: int, t: int) -> st.SearchStrategy:
  """Any bool[b, t]."""
  bits = st.integers(0, 2 ** (b * t) - 1)
  return bits.map(lambda n: (n >> np.arange(b * t) & 1).astype(bool).reshape(b, t))


def masks(b: int, t: int) -> st.SearchStrategy:
  """No padding, padding on the right, or holes anywhere."""
  lengths = st.lists(st.integers(1, t), min_size=b, max_size=b)
  right = lengths.map(lambda n: np.arange(t)[None] < np.array(n)[:, None])
  return st.one_of(flags(b, t), right, st.just(np.ones((b, t), bool)))


def resets(b: int, t: int) -> st.SearchStrategy:
  sparse = st.tuples(flags(b, t), flags(b, t)).map(lambda pair: pair[0] & pair[1])
  return st.one_of(sparse, st.just(np.zeros((b, t), bool)))


def compositions(total: int, parts: tuple[int, ...] = PIECES) -> list[tuple[int, ...]]:
  if total == 0:
    return [()]
  return [(p, *rest) for p in parts if p <= total for rest in compositions(total - p, parts)]


def splits() -> st.SearchStrategy:
  return st.sampled_from([c for c in compositions(LENGTH) if len(c) > 1])


def forms() -> st.SearchStrategy:
  return st.sampled_from(FORMS)


@st.composite
def cases(draw, name: str, batch: int = BATCH, length: int = LENGTH) -> Case:
  """An example with a state that a call left behind, or with the first one."""
  seed, carried = draw(st.integers(0, 999)), draw(st.booleans())
  x, state = _numbers(name, seed, carried, batch, length)
  return Case(x, state, draw(resets(batch, length)), draw(masks(batch, length)))


def alike(name: str, dtype: str, case: Case) -> list[Case]:
  """The case, and in a narrow dtype some of other numbers."""
  if dtype == "float64":
    return [case]
  carried = any(np.any(leaf) for leaf in jax.tree.leaves(case.state))
  others = (_numbers(name, 1000 + i, carried, *case.mask.shape) for i in range(ALIKE - 1))
  return [case, *(case._replace(x=x, state=state) for x, state in others)]


def _numbers(name, seed, carried, batch, length):
  """Inputs, and the state that a call left behind or the first one."""
  subject, rng = SUBJECTS[name], np.random.default_rng(seed)

  def inputs():
    x = subject.inputs(rng, batch, length)
    return x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) else _round(x, jnp.bfloat16)

  x, wide = inputs(), bench(name, "float64")
  state = jax.tree.map(np.asarray, wide.init_state(batch))
  if carried:
    nothing = np.zeros((batch, length), bool)
    state = wide.trial(Case(inputs(), state, nothing, ~nothing), SIMPLEST).state
    state = jax.tree.map(lambda a: _round(np.asarray(a), np.float32), state)
  return x, state


def _round(a, dtype):
  return a.astype(dtype).astype(a.dtype) if np.issubdtype(a.dtype, np.floating) else a


def window(case: Case, start: int, stop: int, state: Any) -> Case:
  """The tokens from `start` to `stop` of a case, as a call of the same shape."""
  inside = (np.arange(LENGTH) >= start) & (np.arange(LENGTH) < stop)
  return case._replace(state=state, mask=case.mask & inside)
