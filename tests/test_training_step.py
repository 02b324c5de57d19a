"""One training step: what it updates, and what it leaves alone."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from toy import ToyBlock

from triform.arch import LanguageModel, build
from triform.arch.layout import split_model
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
  return graphdef, TrainState(params, variables, update.init(params))


def run(model, steps=1, batch=BATCH, update=None):
  update = update or optax.adam(1e-2)
  graphdef, state = start(model, update)
  step_fn = jax.jit(make_train_step(graphdef, update, form="chunkwise", seed=0))
  for step in range(steps):
    state, metrics = step_fn(state, batch, np.int32(step))
  return state, metrics


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


def test_a_non_finite_update_changes_nothing():
  exploding = optax.scale(np.inf)
  model = toy_model(False)
  _, before = start(model, exploding)
  after, metrics = run(model, update=exploding)
  assert not metrics["finite"]
  jax.tree.map(np.testing.assert_array_equal, after, before)


def test_bfloat16_compute_trains_float32_parameters():
  model = build(
    {
      "architecture": "retnet", "vocab_size": VOCAB, "d_model": 8, "num_layers": 2, "num_heads": 2,
      "value_dim": 8, "ffn_dim": 8, "dtype": "bfloat16",
    },
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  first = run(model)[1]["loss"]
  state, metrics = run(model, steps=40)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  assert metrics["finite"] and metrics["loss"] < first
