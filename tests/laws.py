"""The laws of `triform.arch.interface`, as checks of any registered module.

An architecture registers a `Subject`; `test_laws.py` then holds it to every law. What varies
freely from example to example is data (values, resets, masks, where to cut, which form); shapes
come from a short list, because compiling is what takes the time.

Tolerances follow from the dtype. In float64 two algorithms for one function may differ by
`EXACT`. In a narrower dtype the truth is the same module in float64 with the same parameter
values, and a form may be twice as far from it as the simplest form, the recurrent one, in its own
dtype, plus 4 ulp: `2 * err(simplest) + 4 ulp`. Errors are relative Frobenius norms. Gradients are
measured per kind (parameters, inputs, incoming state): a head norm makes the gradient of a query
a difference of nearly equal terms, so that a single leaf's rounding is that of the whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform.arch.interface import FORMS, SequenceModule, put_rows, state_dtype, take_rows

BATCH, LENGTH = 2, 7  # with chunks of 4 tokens: one whole, one ragged
SHAPES = ((1, 1), (3, 4), (1, 13))  # one token, one chunk, three and a bit: for law 1
PIECES = (1, 5)  # a decoding step, and a ragged piece; each a compiled program per form
SIMPLEST = "recurrent"
# Some thousand operations lie between an input and a gradient, each off by 2**-53 at most.
EXACT = 1e-12
DTYPES = ("float32", "bfloat16", "float64")
# The programs are tiny: compile quickly rather than well.
COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later versions have but one code generator
  COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False


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
    oracle: `oracle(variables, x, state, reset, mask) -> (y, state)` in float64 NumPy, if there is
      one; `variables` is a pure dictionary.
  """

  name: str
  make: Callable[..., SequenceModule]
  inputs: Callable[[np.random.Generator, int, int], np.ndarray]
  table: Callable[[dict], np.ndarray] | None = None
  trains: bool = False
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
    compiled = functools.partial(
      jax.jit, static_argnames="form", compiler_options=COMPILER_OPTIONS
    )
    self._call, self._trial = compiled(self._call), compiled(self._trial)

  def context(self):
    return jax.enable_x64(self.dtype == jnp.float64)

  def variables(self) -> dict:
    """Parameters and the rest as one pure dictionary of float64 arrays."""
    merged = nnx.to_pure_dict(nnx.merge_state(self.params, self.rest))
    return jax.tree.map(_widen, merged)

  def module(self) -> SequenceModule:
    return nnx.merge(self.graphdef, self.params, self.rest)

  def init_state(self, b: int = BATCH) -> Any:
    with self.context():
      return self.module().init_state(b)

  def cast_state(self, state: Any) -> Any:
    """A float64 state in the dtypes this one's have."""
    specs = self.init_state(jax.tree.leaves(state)[0].shape[0])
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
    return Outcome(y, state, statistics, parameters, _widen(inputs), floats(incoming))

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

  params, rest = jax.jit(make, compiler_options=COMPILER_OPTIONS)()
  rng = np.random.default_rng(0)
  shaken = jax.tree.map(lambda a: np.float32(a + 0.1 * rng.normal(size=a.shape)), params)
  return shaken, rest


def _pattern(like):
  """Coefficients of a loss, exact in every dtype."""
  values = (np.arange(like.size) * 37 % 17 - 8) / 8
  return jnp.asarray(values.reshape(like.shape), state_dtype(like.dtype))


# Examples


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
  subject, rng = SUBJECTS[name], np.random.default_rng(draw(st.integers(0, 999)))

  def inputs():
    x = subject.inputs(rng, batch, length)
    return x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) else _round(x, jnp.bfloat16)

  x, wide = inputs(), bench(name, "float64")
  state = jax.tree.map(np.asarray, wide.init_state(batch))
  if draw(st.booleans()):
    nothing = np.zeros((batch, length), bool)
    state = wide.trial(Case(inputs(), state, nothing, ~nothing), SIMPLEST).state
    state = jax.tree.map(lambda a: _round(np.asarray(a), np.float32), state)
  return Case(x, state, draw(resets(batch, length)), draw(masks(batch, length)))


def _round(a, dtype):
  return a.astype(dtype).astype(a.dtype) if np.issubdtype(a.dtype, np.floating) else a


def window(case: Case, start: int, stop: int, state: Any) -> Case:
  """The tokens from `start` to `stop` of a case, as a call of the same shape."""
  inside = (np.arange(LENGTH) >= start) & (np.arange(LENGTH) < stop)
  return case._replace(state=state, mask=case.mask & inside)


# Comparing


def _widen(a):
  a = np.asarray(a)
  return a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def floats(tree: Any) -> list:
  return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


def counters(tree: Any) -> list:
  leaves = [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]
  return [np.asarray(a) for a in leaves if not jnp.issubdtype(a.dtype, jnp.floating)]


def error(tree: Any, truth: Any) -> float:
  """Relative Frobenius error over all leaves; absolute where the truth is zero."""
  pairs = list(zip(*(map(_widen, floats(t)) for t in (tree, truth)), strict=True))
  difference = sum(np.sum((a - b) ** 2) for a, b in pairs) ** 0.5
  scale = sum(np.sum(b**2) for _, b in pairs) ** 0.5
  return difference / (scale or 1.0)


def kinds(outcome: Outcome, real: np.ndarray) -> dict[str, Any]:
  """The parts of an outcome that are measured separately. Outputs of padding are not among them."""
  parts = {"outputs": _widen(outcome.y)[real], "gradient of parameters": outcome.parameters}
  parts |= {f"state {i}": leaf for i, leaf in enumerate(floats(outcome.state))}
  parts |= {"gradient of inputs": outcome.inputs, "gradient of state": outcome.incoming}
  parts["statistics"] = outcome.statistics
  return parts


def assert_close(dtype, got: dict, simplest: dict, truth: dict) -> None:
  """`got` is the truth, as far as the dtype allows; see the module's docstring."""
  for kind in got:
    measured, allowed = error(got[kind], truth[kind]), EXACT
    if dtype != jnp.float64:
      allowed = 2 * error(simplest[kind], truth[kind]) + 4 * float(jnp.finfo(dtype).eps)
    assert measured <= allowed, f"{kind} off by {measured:.2g}, allowed {allowed:.2g}"


def assert_same_counters(state: Any, expected: Any) -> None:
  chex.assert_trees_all_equal(counters(state), counters(expected))


# Law 1


def forms_agree(name: str, dtype: str, case: Case, key=None) -> None:
  """Outputs, final state, statistics and all gradients."""
  truth = bench(name, "float64").trial(case, SIMPLEST, key=key)
  outcomes = {form: bench(name, dtype).trial(case, form, key=key) for form in FORMS}
  for outcome in outcomes.values():
    assert_same_counters(outcome.state, truth.state)
    parts = (kinds(o, case.mask) for o in (outcome, outcomes[SIMPLEST], truth))
    assert_close(jnp.dtype(dtype), *parts)


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


def intermediates(f: Callable, *args: Any) -> list[jax.core.ShapedArray]:
  """Every value that a traced function computes, loop bodies included."""

  def is_jaxpr(parameter):
    return hasattr(parameter, "eqns")

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval for v in equation.outvars)
      for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
        if is_jaxpr(inner):
          yield from walk(inner)

  return list(walk(jax.make_jaxpr(f)(*args).jaxpr))


def largest(f: Callable, *args: Any) -> int:
  return max(a.size for a in intermediates(f, *args))


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
  narrow = bench(name, dtype)
  first = narrow.trial(window(case, 0, cut, case.state), piece_forms[0])
  second = narrow.trial(window(case, cut, LENGTH, first.state), piece_forms[1])
  y = np.concatenate([_widen(first.y)[:, :cut], _widen(second.y)[:, cut:]], axis=1)
  whole = narrow.trial(case, SIMPLEST)
  truth = bench(name, "float64").trial(case, SIMPLEST)

  def parts(y, state):
    states = {f"state {i}": leaf for i, leaf in enumerate(floats(state))}
    return {"outputs": _widen(y)[case.mask]} | states

  assert_close(
    jnp.dtype(dtype), parts(y, second.state), *(parts(o.y, o.state) for o in (whole, truth))
  )
  assert_same_counters(second.state, truth.state)


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
  assert np.all(np.isfinite(_widen(second.y)))
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
  assert np.all(np.isfinite(_widen(outcome.y)))


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
  packed = case._replace(reset=reset, mask=mask)
  alone = window(packed, cut, LENGTH, wide.init_state())._replace(reset=np.zeros_like(reset))

  def parts(outcome):
    states = {f"state {i}": leaf for i, leaf in enumerate(floats(outcome.state))}
    return {"outputs": _widen(outcome.y)[alone.mask]} | states

  got, truth = narrow.trial(packed, form), wide.trial(alone, SIMPLEST)
  assert_close(
    jnp.dtype(dtype), *map(parts, (got, narrow.trial(alone, SIMPLEST), truth))
  )
  assert_same_counters(got.state, truth.state)


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
    for leaf in floats(first):
      assert leaf.dtype == state_dtype(narrow.dtype)
    for form in FORMS:
      for t in (1, LENGTH):
        x = narrow._inputs(SUBJECTS[name].inputs(np.random.default_rng(0), BATCH, t))
        y, after = jax.eval_shape(functools.partial(narrow.module(), form=form), x, first)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: first))
        assert y.shape[:2] == (BATCH, t)


def rows_move(name: str, dtype: str, case: Case, form: str) -> None:
  """A call on chosen rows of a state is the chosen rows of a call."""
  narrow, order = bench(name, dtype), np.array([1, 0])
  state = narrow.cast_state(case.state)
  outcome = narrow.trial(case, form)
  swapped = Case(case.x[order], take_rows(state, order), case.reset[order], case.mask[order])
  got = narrow.trial(swapped, form)
  back = put_rows(got.state, order, got.state)
  chex.assert_trees_all_equal(back, outcome.state)
  chex.assert_trees_all_equal(_widen(got.y)[order][case.mask], _widen(outcome.y)[case.mask])
  one = put_rows(state, np.array([0]), take_rows(state, np.array([1])))
  chex.assert_trees_all_equal(
    take_rows(one, np.array([0, 1])), take_rows(state, np.array([1, 1]))
  )


# Law 7


def at_position(state: Any, position: int) -> Any:
  """`state` with its counters of tokens, the unsigned integers, at `position`."""

  def move(a):
    counts = jnp.issubdtype(a.dtype, jnp.unsignedinteger)
    return np.full(a.shape, position, a.dtype) if counts else a

  return jax.tree.map(move, state)


def positions_do_not_drift(name: str, dtype: str, case: Case, form: str, position: int) -> None:
  """Far from the start the error is what it is near it."""
  narrow, wide = bench(name, dtype), bench(name, "float64")

  def errors(position):
    moved = case._replace(state=at_position(case.state, position))
    got, truth = narrow.trial(moved, form), wide.trial(moved, SIMPLEST)
    assert_same_counters(got.state, truth.state)
    got, truth = (kinds(o, case.mask) for o in (got, truth))
    return [error(got[kind], truth[kind]) for kind in truth]

  for far, near in zip(errors(position), errors(100), strict=True):
    allowed = EXACT if dtype == "float64" else 2 * near + 4 * float(jnp.finfo(dtype).eps)
    assert far <= allowed, f"off by {far:.2g}, near the start by {near:.2g}"


def oracle_agrees(name: str, case: Case, form: str, position: int) -> None:
  """The module in float64 is the paper's formula, computed by NumPy from exact integers."""
  wide, state = bench(name, "float64"), at_position(case.state, position)
  outcome = wide.trial(case._replace(state=state), form)
  y, after = SUBJECTS[name].oracle(wide.variables(), case.x, state, case.reset, case.mask)
  assert error(np.asarray(outcome.y)[case.mask], y[case.mask]) <= EXACT
  assert error(outcome.state, after) <= EXACT
  assert_same_counters(outcome.state, after)
