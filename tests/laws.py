"""The laws of `triform.arch.interface`, as checks of any registered module.

An architecture registers a `Subject`; `test_laws.py` then holds it to every law.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from laws_bench import BATCH, LENGTH, SIMPLEST, SUBJECTS, Case, bench, floats, widen
from laws_cases import alike, window
from laws_errors import EXACT, assert_close, assert_same_counters, error, kinds, largest

from triform.arch.interface import FORMS, put_rows, state_dtype, take_rows

# Law 1


def forms_agree(name: str, dtype: str, case: Case, key=None) -> None:
  """Outputs, final state, statistics and all gradients."""
  samples = {form: [] for form in FORMS}
  for one in alike(name, dtype, case):
    truth = bench(name, "float64").trial(one, SIMPLEST, key=key)
    outcomes = {form: bench(name, dtype).trial(one, form, key=key) for form in FORMS}
    for form, outcome in outcomes.items():
      assert_same_counters(outcome.state, truth.state)
      parts = (kinds(o, case.mask) for o in (outcome, outcomes[SIMPLEST], truth))
      samples[form].append(tuple(parts))
  for form in FORMS:
    assert_close(jnp.dtype(dtype), samples[form])


def absent_means_default(name: str, case: Case, form: str) -> None:
  """No state, reset or mask is the first state, no reset and no padding."""
  wide = bench(name, "float64")
  plain = case._replace(
    state=wide.init_state(), reset=np.zeros_like(case.reset), mask=np.ones_like(case.mask)
  )
  expected = wide.trial(plain, form)
  got = wide.call(case.x, None, form=form)
  assert error(got, (expected.y, expected.state)) <= EXACT
  assert_same_counters(got[1], expected.state)


def forms_are_algorithms(name: str, t: int = 512) -> None:
  """The memory of the chunkwise and recurrent forms is linear in the length."""
  wide = bench(name, "float32")
  for form in ("chunkwise", "recurrent"):
    sizes = []
    for length in (t, 2 * t):
      x = np.zeros((1, length), np.int32)
      if SUBJECTS[name].table is None:
        x = SUBJECTS[name].inputs(np.random.default_rng(0), 1, length)
      sizes.append(largest(functools.partial(wide.module(), form=form), wide._inputs(x)))
    assert sizes[1] <= 2 * sizes[0], f"{form}: {sizes}"
    assert sizes[0] < t * t, f"{form}: {sizes[0]} numbers at {t} tokens"


# Law 2


def splits_compose(name: str, case: Case, lengths, piece_forms, whole_form) -> None:
  """In float64, as calls of the pieces' own lengths."""
  wide = bench(name, "float64")
  whole = wide.trial(case, whole_form)
  state, outputs = wide.cast_state(case.state), []
  for start, length, form in zip(np.cumsum((0, *lengths)), lengths, piece_forms, strict=False):
    piece = np.s_[:, start : start + length]
    y, state = wide.call(
      case.x[piece], state, form=form, reset=case.reset[piece], mask=case.mask[piece]
    )
    outputs.append(np.asarray(y))
  real = np.concatenate(outputs, axis=1)[case.mask]
  assert error((real, state), (whole.y[case.mask], whole.state)) <= EXACT
  assert_same_counters(state, whole.state)


def windows_compose(name: str, dtype: str, case: Case, cut: int, piece_forms) -> None:
  """In any dtype, the pieces being the same call with all else masked."""
  narrow, samples = bench(name, dtype), []

  def parts(y, state):
    states = {f"state {i}": leaf for i, leaf in enumerate(floats(state))}
    return {"outputs": widen(y)[case.mask]} | states

  for one in alike(name, dtype, case):
    first = narrow.trial(window(one, 0, cut, one.state), piece_forms[0])
    second = narrow.trial(window(one, cut, LENGTH, first.state), piece_forms[1])
    y = np.concatenate([widen(first.y)[:, :cut], widen(second.y)[:, cut:]], axis=1)
    whole, truth = narrow.trial(one, SIMPLEST), bench(name, "float64").trial(one, SIMPLEST)
    assert_same_counters(second.state, truth.state)
    whole, truth = (parts(o.y, o.state) for o in (whole, truth))
    samples.append((parts(y, second.state), whole, truth))
  assert_close(jnp.dtype(dtype), samples)


# Law 3


def padding_is_invisible(name: str, dtype: str, case: Case, form: str, seed: int, key=None) -> None:
  """What stands at masked tokens, `reset` included, changes no bit of anything real."""
  rng, narrow = np.random.default_rng(seed), bench(name, dtype)
  other = SUBJECTS[name].inputs(rng, BATCH, LENGTH).astype(case.x.dtype)
  junk = case._replace(
    x=np.where(case.mask.reshape(BATCH, LENGTH, *[1] * (other.ndim - 2)), case.x, other),
    reset=np.where(case.mask, case.reset, rng.random(case.mask.shape) < 0.5),
  )
  first, second = (narrow.trial(c, form, key=key) for c in (case, junk))
  assert np.all(np.isfinite(widen(second.y)))
  if SUBJECTS[name].table is None:
    assert not second.inputs[~case.mask].any()
  else:  # other ids fill other rows of the table
    first, second = (o._replace(parameters=(), inputs=o.inputs[case.mask]) for o in (first, second))
  for kind, expected in kinds(first, case.mask).items():
    assert error(kinds(second, case.mask)[kind], expected) == 0, kind
  assert_same_counters(second.state, first.state)


def holes_are_skipped(name: str, case: Case, count: int, form: str, seed: int) -> None:
  """Tokens with holes between them equal the same tokens without."""
  rng, wide = np.random.default_rng(seed), bench(name, "float64")
  chosen = np.sort([rng.permutation(LENGTH)[:count] for _ in range(BATCH)], axis=1)
  rows = np.arange(BATCH)[:, None]
  mask = np.zeros_like(case.mask)
  mask[rows, chosen] = True
  holes = wide.trial(case._replace(mask=mask), form)
  y, state = wide.call(
    case.x[rows, chosen],
    wide.cast_state(case.state),
    form=SIMPLEST,
    reset=case.reset[rows, chosen],
    mask=np.ones((BATCH, count), bool),
  )
  assert error((np.asarray(holes.y)[rows, chosen], holes.state), (y, state)) <= EXACT
  assert_same_counters(holes.state, state)


def masked_calls_change_nothing(name: str, dtype: str, case: Case, form: str) -> None:
  """Bit for bit: a zero keeps its sign."""
  negative = jax.tree.map(
    lambda a: np.where(a == 0, -np.abs(a), a) if np.issubdtype(a.dtype, np.floating) else a,
    jax.tree.map(np.asarray, case.state),
  )
  narrow = bench(name, dtype)
  masked = case._replace(state=negative, mask=np.zeros_like(case.mask))
  outcome = narrow.trial(masked, form)
  before = narrow.cast_state(negative)
  for new, old in zip(*map(jax.tree.leaves, (outcome.state, before)), strict=True):
    assert new.dtype == old.dtype and np.asarray(new).tobytes() == old.tobytes()
  assert np.all(np.isfinite(widen(outcome.y)))


# Law 4


def packing_is_separation(name: str, case: Case, row_lengths, form: str, alone_form: str) -> None:
  """In float64, against documents of their own lengths without `reset`, state or mask."""
  wide = bench(name, "float64")
  reset = np.zeros_like(case.reset)
  for row, lengths in enumerate(row_lengths):
    reset[row, np.cumsum((0, *lengths[:-1]))] = True
  packed = wide.trial(case._replace(reset=reset, mask=np.ones_like(case.mask)), form)
  nothing = np.zeros_like(reset)
  for row, lengths in enumerate(row_lengths):
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
      piece = np.s_[:, start : start + length]
      y, state = wide.call(
        case.x[piece],
        wide.init_state(),
        form=alone_form,
        reset=nothing[piece],
        mask=~nothing[piece],
      )
      assert error(np.asarray(packed.y)[row, piece[1]], np.asarray(y)[row]) <= EXACT
    last, expected = (take_rows(s, np.array([row])) for s in (packed.state, state))
    assert error(last, expected) <= EXACT
    assert_same_counters(last, expected)


def documents_are_windows(name: str, dtype: str, case: Case, cut: int, form: str) -> None:
  """In any dtype, with padding: two documents, the second also alone."""
  narrow, wide = bench(name, dtype), bench(name, "float64")
  reset = np.zeros_like(case.reset)
  reset[:, cut] = True
  mask = case.mask.copy()
  mask[:, cut] = True  # a masked reset would begin no document
  samples = []
  for one in alike(name, dtype, case._replace(reset=reset, mask=mask)):
    alone = window(one, cut, LENGTH, wide.init_state())._replace(reset=np.zeros_like(reset))
    got, truth = narrow.trial(one, form), wide.trial(alone, SIMPLEST)
    assert_same_counters(got.state, truth.state)

    def parts(outcome, real=alone.mask):
      states = {f"state {i}": leaf for i, leaf in enumerate(floats(outcome.state))}
      return {"outputs": widen(outcome.y)[real]} | states

    samples.append(tuple(map(parts, (got, narrow.trial(alone, SIMPLEST), truth))))
  assert_close(jnp.dtype(dtype), samples)


# Law 5


def outputs_are_causal(name: str, dtype: str, case: Case, form: str, row: int, token: int) -> None:
  """One output depends on the tokens of its document so far, and on exactly nothing else."""
  mask = case.mask.copy()
  mask[row, token] = True
  weights = np.zeros(mask.shape)
  weights[row, token] = 1
  outcome = bench(name, dtype).trial(
    case._replace(mask=mask), form, weights=weights, state_weight=0.0
  )
  starts = np.flatnonzero((case.reset & mask)[row, : token + 1])
  begin = starts[-1] if len(starts) else 0
  reaching = np.zeros(mask.shape, bool)
  reaching[row, begin : token + 1] = mask[row, begin : token + 1]
  assert not outcome.inputs[~reaching].any()
  assert outcome.inputs[row, token].any()
  for other in range(BATCH):
    if other != row or len(starts):
      assert not any(a.any() for a in _row_of(outcome.incoming, case.state, other))


def _row_of(leaves: list, state: Any, row: int) -> list:
  """A row of the float leaves of a state."""
  remaining = iter(leaves)
  full = jax.tree.map(lambda a: next(remaining) if len(floats(a)) else a, state)
  return floats(take_rows(full, np.array([row])))


# Law 6


def state_is_constant(name: str, dtype: str) -> None:
  """Same structure, shapes and dtypes in and out, whatever the length; wide accumulators."""
  narrow = bench(name, dtype)
  if not narrow.module().state_is_constant:
    return
  with narrow.context():
    first = narrow.init_state()
    for leaf in floats(accumulators(first)):
      assert leaf.dtype == state_dtype(narrow.dtype)
    for form in FORMS:
      for t in (1, LENGTH):
        x = narrow._inputs(SUBJECTS[name].inputs(np.random.default_rng(0), BATCH, t))
        y, after = jax.eval_shape(functools.partial(narrow.module(), form=form), x, first)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: first))
        assert y.shape[:2] == (BATCH, t)


def accumulators(state: Any) -> list:
  """The leaves of a state but for copies of what was computed: caches, inputs of convolutions."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  copies = {"k", "v", "tails"}
  return [a for path, a in leaves if not copies & {getattr(key, "name", None) for key in path}]


def rows_move(name: str, dtype: str, case: Case, form: str) -> None:
  """A call on chosen rows of a state is the chosen rows of a call."""
  narrow, order = bench(name, dtype), np.array([1, 0])
  state = narrow.cast_state(case.state)
  outcome = narrow.trial(case, form)
  swapped = Case(case.x[order], take_rows(state, order), case.reset[order], case.mask[order])
  got = narrow.trial(swapped, form)
  back = put_rows(got.state, order, got.state)
  chex.assert_trees_all_equal(back, outcome.state)
  chex.assert_trees_all_equal(widen(got.y)[order][case.mask], widen(outcome.y)[case.mask])
  one = put_rows(state, np.array([0]), take_rows(state, np.array([1])))
  chex.assert_trees_all_equal(take_rows(one, np.array([0, 1])), take_rows(state, np.array([1, 1])))


# Law 7

SAMPLES, STRIDE = 15, 1571  # positions, far enough apart that slow phases differ as well


def at_position(state: Any, position: int) -> Any:
  """`state` with its counters of tokens, the unsigned integers, at `position`."""

  def move(a):
    counts = jnp.issubdtype(a.dtype, jnp.unsignedinteger)
    return np.full(a.shape, position, a.dtype) if counts else a

  return jax.tree.map(move, state)


def reachable(module: Any, position: int) -> int:
  """`position`, or what a cache has room for."""
  return position if module.max_len is None else min(position, module.max_len - LENGTH)


def positions_do_not_drift(name: str, dtype: str, case: Case, form: str, position: int) -> None:
  """Far from the start the error is what it is near it.

  How a position is rounded, and what that does to what follows, differs by a factor of ten from one
  to the next, so each error is the median of `SAMPLES` positions.
  """
  narrow, wide = bench(name, dtype), bench(name, "float64")

  def errors(position):
    moved = case._replace(state=at_position(case.state, position))
    got, truth = narrow.trial(moved, form), wide.trial(moved, SIMPLEST)
    assert_same_counters(got.state, truth.state)
    got, truth = (kinds(o, case.mask) for o in (got, truth))
    return [error(got[kind], truth[kind]) for kind in truth]

  def typical(positions):
    held = {reachable(wide.module(), int(position)) for position in positions}
    return np.median([errors(position) for position in held], axis=0)

  steps = STRIDE * np.arange(SAMPLES)
  for far, near in zip(typical(position - steps), typical(100 + steps), strict=True):
    allowed = EXACT if dtype == "float64" else 2 * near + 4 * float(jnp.finfo(dtype).eps)
    assert far <= allowed, f"off by {far:.2g}, near the start by {near:.2g}"


def oracle_agrees(name: str, case: Case, form: str, position: int) -> None:
  """The module in float64 is the paper's formula, computed by NumPy from exact integers."""
  wide = bench(name, "float64")
  state = at_position(case.state, reachable(wide.module(), position))
  outcome = wide.trial(case._replace(state=state), form)
  y, after = SUBJECTS[name].oracle(wide.variables(), case.x, state, case.reset, case.mask)
  assert error(np.asarray(outcome.y)[case.mask], y[case.mask]) <= EXACT
  assert error(outcome.state, after) <= EXACT
  assert_same_counters(outcome.state, after)
