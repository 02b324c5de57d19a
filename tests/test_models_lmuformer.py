"""LMUFormer's own promises: its sizes, its state, what it hears when, and its options."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from laws_bench import SUBJECTS, bench
from laws_errors import EXACT, assert_same_counters, error
from laws_subjects import awake

from triform.arch import state_bytes
from triform.arch.interface import FORMS, take_rows
from triform.arch.layers.batch_norm import BatchNorm
from triform.arch.layers.normed import fold_batch_norm
from triform.arch.layers.spiking import LIF
from triform.arch.models.lmuformer import LMUFormer

B, T, I, D, CLASSES = 2, 13, 6, 8, 4
SIZES = {
  "in_features": I, "num_classes": CLASSES, "d_model": D, "num_layers": 1, "mlp_ratio": 2,
  "order": 4, "theta": 6.0, "chunk_size": 4, "scan_layers": False,
}  # fmt: skip
VARIANTS, PADDINGS = ("plain", "spiking_ms", "spiking"), ("causal", "same")
LOOKAHEAD = 5
PIECE = 6  # tokens of a call whose mask says how many it has
every_model = pytest.mark.parametrize(
  ("variant", "padding"),
  [
    ("plain", "causal"),
    pytest.param("spiking_ms", "same", marks=pytest.mark.slow),
    pytest.param("plain", "same", marks=pytest.mark.slow),
    pytest.param("spiking", "causal", marks=pytest.mark.slow),
  ],
)


def make(variant="plain", padding="causal", **options):
  """A model none of whose weights and statistics is as it starts, and whose neurons spike."""
  options = {"variant": variant, "padding": padding, **SIZES, **options}
  model = awake(LMUFormer(**options, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)

  def shake(a):
    return jnp.asarray(a + 0.2 * np.abs(rng.normal(size=a.shape)) * np.where(a < 0, -1, 1), a.dtype)

  nnx.update(model, jax.tree.map(shake, nnx.state(model, (nnx.Param, nnx.BatchStat))))
  return model


@functools.lru_cache
def wide(variant, padding):
  with jax.enable_x64():
    return make(variant, padding, param_dtype=jnp.float64)


def compiled(model, method="__call__"):
  graphdef, variables = nnx.split(model)

  @functools.partial(jax.jit, static_argnames="form")
  def call(*args, **options):
    return getattr(nnx.merge(graphdef, variables), method)(*args, **options)

  return call


@functools.lru_cache
def wide_compiled(variant, padding, method="__call__"):
  return compiled(wide(variant, padding), method)


def frames(b=B, t=T, seed=1):
  return np.random.default_rng(seed).normal(size=(b, t, I))


def numbers(state):
  return sum(leaf.size for leaf in jax.tree.leaves(state))


def rates(model, x):
  """How often the neurons of every layer spike, on average."""

  def layers(model):
    return {path: m for path, m in nnx.iter_graph(model) if isinstance(m, LIF)}

  for neuron in layers(model).values():
    neuron.measuring = True
  graphdef, variables = nnx.split(model)

  @jax.jit
  def run(variables, x):
    model = nnx.merge(graphdef, variables)
    model(x, form="recurrent")
    return [neuron.rate[...].mean() for neuron in layers(model).values()]

  return dict(zip(layers(model), map(float, run(variables, x)), strict=True))


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_the_neurons_of_these_tests_spike(variant):
  for layer, rate in rates(make(variant), np.float32(frames(8, 20))).items():
    assert 0.03 < rate < 0.97, layer


@pytest.mark.slow
def test_the_neurons_of_the_laws_spike():
  wide = bench("lmuformer-spiking", "float64")
  x = SUBJECTS["lmuformer-spiking"].inputs(np.random.default_rng(0), 8, 20)
  with wide.context():
    for layer, rate in rates(wide.module().model, x).items():
      assert 0.03 < rate < 0.97, layer


# Published sizes


@pytest.mark.parametrize(
  ("variant", "parameters", "state"),
  [
    # Tails of five convolutions, the memory, the sum of features and their number.
    ("plain", 1_621_796, 2304 + 256 + 256 + 1),
    # Also what the residual waits for, and potentials.
    ("spiking_ms", 1_689_894, 2304 + 256 + 512 + 3585 + 256 + 1),
    ("spiking", 1_689_382, 2304 + 512 + 3585 + 256 + 1),
  ],
)
def test_published_sizes(variant, parameters, state):
  """In the published configuration, which is the default one but for the padding."""

  def model(padding):
    return nnx.eval_shape(lambda: LMUFormer(variant=variant, padding=padding, rngs=nnx.Rngs(0)))

  for padding in PADDINGS:
    assert numbers(nnx.state(model(padding), nnx.Param)) == parameters
  held = jax.eval_shape(lambda: model("same").init_state(1))
  assert numbers(held) == state and state_bytes(held) == 4 * state
  assert state_bytes(jax.eval_shape(lambda: model("same").init_state(3))) == 12 * state
  waiting = 256 if variant == "spiking_ms" else 0
  assert numbers(jax.eval_shape(lambda: model("causal").init_state(1))) == state - waiting


# What is heard


def alone(model, variant, padding, x):
  """Features `[n, d]` of a document `[n, i]` by itself, and the state behind it."""
  n = len(x)
  rest = np.zeros((1, T - n, I))
  mask = np.arange(T)[None] < n
  features, state = wide_compiled(variant, padding, "encode")(
    np.concatenate([x[None], rest], axis=1), model.init_state(1), form="recurrent", mask=mask
  )
  flushed = wide_compiled(variant, padding, "flush")(state)
  return np.concatenate([features[0, :n], flushed[0]])[model.lookahead :], state


@every_model
@given(data=st.data())
def test_answers_are_of_the_mean_of_a_documents_features(variant, padding, data):
  """Logits and state, of pieces of any form with holes and resets anywhere."""
  with jax.enable_x64():
    model, call = wide(variant, padding), wide_compiled(variant, padding)
    documents, state = [frames(1, 0)[0] for _ in range(B)], model.init_state(B)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    for _ in range(data.draw(st.integers(1, 4))):
      x = 3 * rng.normal(size=(B, PIECE, I))
      mask = rng.random((B, PIECE)) < rng.choice([0.2, 0.7, 1.0], size=(B, 1))
      reset = rng.random((B, PIECE)) < 0.2
      for row in range(B):
        for n in np.flatnonzero(mask[row]):
          if reset[row, n] or len(documents[row]) == T:
            reset[row, n] = True
            documents[row] = documents[row][:0]
          documents[row] = np.concatenate([documents[row], x[row, n : n + 1]])
      x[~mask] = np.nan
      form = data.draw(st.sampled_from(FORMS))
      logits, state = call(x, state, form=form, reset=reset, mask=mask)
      read = wide_compiled(variant, padding, "read_out")(state)
      assert error(read, logits) <= EXACT
      for row, document in enumerate(documents):
        features, expected = alone(model, variant, padding, document)
        assert len(features) == len(document)
        mean = features.mean(axis=0) if len(features) else np.zeros(D)
        assert error(logits[row], model.head(mean[None])[0]) <= EXACT
        own = take_rows(state, np.array([row]))
        assert error(own, expected) <= EXACT
        assert_same_counters(own, expected)


def flagged(seed):
  """Frames, resets and masks of `PIECE` tokens."""
  rng = np.random.default_rng(seed)
  shape = (B, PIECE)
  return frames(t=PIECE, seed=seed), rng.random(shape) < 0.3, rng.random(shape) < 0.7


@every_model
def test_padding_leaves_the_state_bit_for_bit(variant, padding):
  """A zero keeps its sign, and whoever has heard nothing is told the bias of the head."""
  x, reset, mask = flagged(0)
  mask[0, 2] = True
  mask[1] = False
  x[~mask] = np.nan
  with jax.enable_x64():
    model, call = wide(variant, padding), wide_compiled(variant, padding)
    _, state = call(frames(t=PIECE), model.init_state(B), reset=reset, mask=~np.zeros_like(mask))

    def negative(a):
      return a if a.dtype == np.uint32 else jnp.where(a == 0, -jnp.abs(a), a)

    state = jax.tree.map(negative, state)
    for form in FORMS:
      logits, after = call(x, state, form=form, reset=reset, mask=mask)
      for old, new in zip(*(jax.tree.leaves(s) for s in (state, after)), strict=True):
        assert np.asarray(old[1]).tobytes() == np.asarray(new[1]).tobytes()
      logits, _ = call(x, model.init_state(B), form=form, reset=reset, mask=mask)
      np.testing.assert_array_equal(logits[1], model.head.bias[...])
      assert np.isfinite(logits).all() and (logits[0] != logits[1]).any()


@every_model
def test_rows_do_not_know_of_each_other(variant, padding):
  with jax.enable_x64():
    state, call = wide(variant, padding).init_state(B), wide_compiled(variant, padding)
    x, reset, mask = flagged(0)
    other = x.copy()
    other[1] = np.nan
    for form in FORMS:
      one, two = (call(a, state, form=form, reset=reset, mask=mask) for a in (x, other))
      first = np.array([0])
      chex.assert_trees_all_equal(take_rows(one[1], first), take_rows(two[1], first))
      np.testing.assert_array_equal(one[0][0], two[0][0])


@every_model
@pytest.mark.parametrize(
  "form", [FORMS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[1:])]
)
def test_look_ahead_is_as_told(variant, padding, form):
  """How late a frame the features depend on, exactly; `encode` gives them so much later."""
  with jax.enable_x64():
    model = wide(variant, padding)

    def features(x):
      encoded, state = model.encode(x, form=form)
      return jnp.concatenate([encoded, model.flush(state)], axis=1)[0].sum(axis=-1)

    depends = jax.jit(jax.jacrev(features))(jnp.asarray(frames(1)))[:, 0].any(axis=-1)
  ahead = LOOKAHEAD if padding == "same" else 0
  assert model.lookahead == ahead and model.causal == (padding == "causal")
  assert depends[ahead:].any() and not depends[np.triu_indices(T, 1)].any()
  assert np.diag(depends[:T])[ahead:].all()


@every_model
def test_a_flush_has_what_look_ahead_holds(variant, padding):
  model = wide(variant, padding)
  with jax.enable_x64():
    flushed = wide_compiled(variant, padding, "flush")(model.init_state(B))
  assert flushed.shape == (B, model.lookahead, D) and flushed.dtype == np.float64


# What inference does without


@every_model
@pytest.mark.parametrize("layers", [1, pytest.param("2 scanned", marks=pytest.mark.slow)])
def test_batch_norms_are_folded(variant, padding, layers):
  options = {} if layers == 1 else {"num_layers": 2, "scan_layers": True}
  x, reset, mask = flagged(0)
  with jax.enable_x64():
    model = make(variant, padding, **options, param_dtype=jnp.float64)
    before = jax.tree.map(np.asarray, nnx.state(model))
    folded = fold_batch_norm(model)
    found, expected = (
      compiled(m)(x, model.init_state(B), reset=reset, mask=mask) for m in (folded, model)
    )
    assert error(found, expected) <= EXACT
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, nnx.state(model)))
  # Those behind the rectifiers of the stem, those before neurons of the residual, the memory's.
  left = {"plain": 4, "spiking_ms": 2 + 3, "spiking": 1}[variant]
  assert sum(isinstance(m, BatchNorm) for _, m in nnx.iter_graph(folded)) == left
  assert sum(isinstance(m, BatchNorm) for _, m in nnx.iter_graph(model)) > left


# Options


def training(**options):
  """A function of a key: logits in training, and the gradients of the sum of their squares."""
  graphdef, params, rest = nnx.split(make(**options), nnx.Param, ...)
  x = np.float32(frames())

  @jax.jit
  def run(params, key):
    def loss(params):
      model = nnx.merge(graphdef, params, jax.tree.map(lambda a: a, rest))
      logits, _ = model(x, rngs=nnx.Rngs(key))
      return jnp.square(logits).sum(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    return logits, nnx.to_pure_dict(gradients)

  def call(seed):
    logits, gradients = run(params, jax.random.key(seed))
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return np.asarray(logits), dict(
      zip(names, (np.asarray(leaf) for _, leaf in leaves), strict=True)
    )

  return call


@functools.lru_cache
def as_published():
  return training(variant="spiking_ms")(0)


@pytest.mark.parametrize(
  ("options", "moves_logits"),
  [
    pytest.param({"tau": 3.0}, True, marks=pytest.mark.slow),
    ({"reset_value": None}, True),
    ({"surrogate": "atan"}, False),
    pytest.param({"surrogate": "triangle"}, False, marks=pytest.mark.slow),
    pytest.param({"slope": 2.0}, False, marks=pytest.mark.slow),
    pytest.param({"detach_reset": False}, False, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_neurons_are_as_told(options, moves_logits):
  """What stands for the derivative of a spike moves gradients alone. All are finite."""
  (logits, gradients), (told, published) = (
    training(variant="spiking_ms", **options)(0),
    as_published(),
  )
  assert all(np.isfinite(leaf).all() for leaf in gradients.values())
  assert (np.abs(logits - told).max() > 1e-3) == moves_logits
  kernel = "stem/convs/0/linear/kernel"
  assert error(gradients[kernel], published[kernel]) > 1e-3


def test_time_constants_are_learnt():
  """One of each layer of neurons."""
  _, gradients = training(variant="spiking_ms", learn_tau=True)(0)
  learnt = {name: leaf for name, leaf in gradients.items() if name.endswith("tau_logit")}
  assert gradients.keys() - learnt.keys() == as_published()[1].keys() and len(learnt) == 11
  assert all(np.isfinite(leaf) and leaf.shape == () and leaf != 0 for leaf in learnt.values())


@pytest.mark.parametrize("variant", ["plain", pytest.param("spiking_ms", marks=pytest.mark.slow)])
def test_dropout_is_of_training(variant):
  x = np.float32(frames())
  some, none = (make(variant, dropout=rate) for rate in (0.5, 0.0))
  np.testing.assert_array_equal(*(compiled(model)(x)[0] for model in (some, none)))
  drop, keep = (training(variant=variant, dropout=rate) for rate in (0.5, 0.0))
  (one, _), (other, _), (again, _) = (drop(seed) for seed in (0, 1, 0))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  np.testing.assert_array_equal(keep(0)[0], keep(1)[0])


@pytest.mark.parametrize(
  "variant", ["plain", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[1:])]
)
def test_many_memory_channels(variant):
  """Every channel has an input, and all forms agree."""
  x = frames()
  with jax.enable_x64():
    model = make(variant, "same", memory_channels=3, param_dtype=jnp.float64)
    mixer = model.stack.layers[0].mixer
    layer = mixer.lmu.input if variant == "plain" else mixer.input.linear
    assert layer.kernel[...].shape == (D, 3)
    call = compiled(model)
    (logits, state), *others = (call(x, model.init_state(B), form=form) for form in FORMS)
    for outcome in others:
      assert error(outcome, (logits, state)) <= EXACT
    memory = np.asarray(state.stack[0].mixer.memory)
    assert memory.shape == (B, 3, 4)
    assert (memory[:, 0] != memory[:, 1]).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_narrow_computation_keeps_what_adds_up_wide(variant):
  model = make(variant, "same", dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype("float32")}

  def outcomes(x):
    features, _ = model.encode(x)
    logits, after = model(x)
    return features, logits, after

  features, logits, state = jax.eval_shape(outcomes, np.float32(frames()))
  assert features.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  before = jax.eval_shape(lambda: model.init_state(B))
  chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
  potentials = jax.tree.leaves((state.stack, state.neuron, state.stem.potentials, state.total))
  assert len(potentials) > 1 and {leaf.dtype for leaf in potentials} == {np.dtype("float32")}
  assert {leaf.dtype for leaf in state.stem.tails} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"variant": "ms"}, "variant is 'ms', expected one of plain, spiking_ms, spiking"),
    ({"padding": "valid"}, "padding is 'valid', expected one of causal, same"),
    ({"order": 0}, "order is 0, expected at least 1"),
    ({"memory_channels": 0}, "channels is 0, expected at least 1"),
    ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
    ({"theta": -1.0}, "theta is -1.0, expected a positive number of tokens"),
    ({"variant": "spiking", "order": 0}, "order is 0, expected at least 1"),
    ({"variant": "spiking", "memory_channels": 0}, "channels is 0, expected at least 1"),
    ({"variant": "spiking_ms", "chunk_size": 0}, "chunk_size is 0, expected at least 1"),
    ({"variant": "spiking_ms", "theta": 0.0}, "theta is 0.0, expected a positive number of tokens"),
    ({"variant": "spiking", "tau": 0.5}, "tau is 0.5, expected at least 1"),
    ({"variant": "spiking", "tau": 1.0, "learn_tau": True}, "tau is 1.0, expected above 1 where"),
    ({"variant": "spiking", "surrogate": "step"}, "surrogate is 'step', expected one of atan, sig"),
    ({"variant": "spiking", "slope": 0.0}, "slope is 0.0, expected above 0"),
    ({"remat": "some"}, "remat is 'some', expected one of none, dots, full"),
  ],
  ids=str,
)
def test_bad_options_are_told(options, message):
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(lambda: LMUFormer(**{**SIZES, **options}, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m, x: m(x[..., :2]), r"x has shape \[2, 13, 2\], expected \[batch, time, 6\]"),
    (lambda m, x: m(x[:, :0]), r"x has shape \[2, 0, 6\], expected \[batch, time, ...\] with time"),
    (lambda m, x: m(x, form="serial"), "form is 'serial', expected one of parallel, chunkwise"),
    (lambda m, x: m.encode(x, mask=np.ones((2, 3), bool)), r"mask is bool\[2, 3\], expected bool"),
  ],
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_bad_arguments_are_told(call, message, padding):
  with pytest.raises(ValueError, match=message):
    call(make(padding=padding), np.float32(frames()))


TREE_MODE = """
import sys, flax, pytest
assert flax.config.nnx_graph_mode is False
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_holds_in_the_tree_mode_of_flax():
  """The suite's own process runs in graph mode."""
  run = subprocess.run(
    [sys.executable, "-c", TREE_MODE, "-q", "-x", __file__, "-k", "not tree_mode"],
    cwd=Path(__file__).parent.parent,
    env=os.environ | {"NNX_GRAPH_MODE": "false"},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
