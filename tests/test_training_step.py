"""One training step: what it updates, and what it leaves alone."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from toy import ToyBlock

from triform.arch import LanguageModel, build
from triform.arch.layout import split_model, to_stacked
from triform.arch.training.step import TrainState, make_train_step, token_losses

B, T, VOCAB = 2, 12, 9
RNG = np.random.default_rng(0)
BATCH = {
  "inputs": RNG.integers(0, VOCAB, (B, T)),
  "targets": RNG.integers(0, VOCAB, (B, T)),
  "reset": np.zeros((B, T), bool),
  "mask": np.arange(T)[None] < np.array([[T], [T - 5]]),
}
BATCH["loss_mask"] = BATCH["mask"] & (np.arange(T) > 2)[None]  # a prompt is read, not trained on


def toy_model(scan):
  def make_block(rngs):
    return ToyBlock(8, dtype=np.float32, param_dtype=np.float32, rngs=rngs)

  return LanguageModel(
    make_block,
    vocab_size=VOCAB,
    d_model=8,
    num_layers=2,
    norm=nnx.RMSNorm(8, rngs=nnx.Rngs(0)),
    embedding_init=nnx.initializers.normal(1.0),
    scan_layers=scan,
    rngs=nnx.Rngs(0),
  )


def start(model, update):
  graphdef, params, variables = split_model(model)
  return graphdef, TrainState(params, variables, update.init(params), params)


def run(model, steps=1, batch=BATCH, update=None, first=0, **options):
  update = update or optax.adam(1e-2)
  graphdef, state = start(model, update)
  options = {"average_decay": 0.9, **options}
  step_fn = jax.jit(make_train_step(graphdef, update, form="chunkwise", seed=0, **options))
  for step in range(first, first + steps):
    state, metrics = step_fn(state, batch, np.int32(step))
  return state, metrics


def retnet(**options):
  small = {"vocab_size": VOCAB, "d_model": 8, "num_layers": 2, "num_heads": 2, "value_dim": 8}
  return build({"architecture": "retnet", **small, "ffn_dim": 8, **options}, rngs=nnx.Rngs(0))


def test_parts_of_a_batch_add_up_to_the_batch():
  """By tokens, not by parts: the rows have different numbers of them."""
  rng = np.random.default_rng(1)
  batch = {name: np.concatenate([a, rng.permutation(a)]) for name, a in BATCH.items()}
  batch["loss_mask"][0] = False
  sgd = optax.sgd(1.0)
  whole, metrics = run(retnet(), batch=batch, update=sgd)
  for parts in (2, 4):
    state, accumulated = run(retnet(), batch=batch, update=sgd, accumulate=parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, whole)
    np.testing.assert_allclose(accumulated["loss"], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_batch_statistics_go_through_the_parts(scan):
  mean = "stack/layers/norm/mean"
  whole, parts = (to_stacked(run(toy_model(scan), accumulate=n)[0].variables)[mean] for n in (1, 2))
  assert np.isfinite(parts).all() and np.abs(parts - whole).max() > 1e-6


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (20, 0.7), (1000, 0.9)])
def test_average_follows_the_parameters(step, decay):
  """Quickly at first: what random parameters leave in it would spoil it for long."""
  model = retnet()
  before = split_model(model)[1]
  state, _ = run(model, first=step)
  expected = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, before, state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.average, expected)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_what_is_stored_not_what_is_computed(scan, remat):
  sgd = optax.sgd(1.0)
  results, stored = [], []
  for policy in ("none", remat):
    model = retnet(scan_layers=scan, remat=policy, dropout=0.3)
    results.append(run(model, update=sgd)[0].params)
    graphdef, params, variables = split_model(model)

    def loss(params, graphdef=graphdef, variables=variables):
      return nnx.merge(graphdef, params, variables)(BATCH["inputs"])[0].sum()

    residuals = jax.tree.leaves(jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params))
    stored.append(sum(leaf.size for leaf in residuals))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)
  assert stored[1] < 0.8 * stored[0]


@pytest.mark.parametrize("scan", [False, True])
def test_batch_statistics_are_carried(scan):
  model = toy_model(scan)
  before = split_model(model)[2]
  after, _ = run(model, steps=3)
  changed = jax.tree.map(
    lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, after[1]
  )
  flags = dict(jax.tree_util.tree_leaves_with_path(changed))
  for path, differs in flags.items():
    assert differs == (path[-1].key in ("mean", "var")), path


def test_padding_and_targets_that_are_not_trained_on_do_not_enter_a_step():
  other = {**BATCH, "inputs": np.where(BATCH["mask"], BATCH["inputs"], 3)}
  other["targets"] = np.where(BATCH["loss_mask"], BATCH["targets"], 5)
  states = [run(toy_model(False), batch=batch)[0] for batch in (BATCH, other)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *states)


def test_loss_is_the_mean_over_trained_tokens():
  model = toy_model(False)
  logits, _ = model(BATCH["inputs"], mask=BATCH["mask"], reset=BATCH["reset"])
  losses = np.asarray(token_losses(logits, BATCH))
  expected = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), BATCH["targets"][..., None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(losses, np.where(BATCH["loss_mask"], expected, 0), atol=1e-5)
  metrics = run(model)[1]
  assert float(metrics["total_loss"] / metrics["loss"]) == pytest.approx(BATCH["loss_mask"].sum())


def test_metrics_tell_of_a_non_finite_update():
  assert run(toy_model(False))[1]["finite"]
  assert not run(toy_model(False), update=optax.scale(np.inf))[1]["finite"]


def test_bfloat16_compute_trains_float32_parameters():
  model = retnet(dtype="bfloat16")
  first = run(model)[1]["loss"]
  state, metrics = run(model, steps=40)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  assert metrics["finite"] and metrics["loss"] < first
