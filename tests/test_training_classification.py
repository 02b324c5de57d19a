"""A classifier through all that a language model goes through: one trainer, one evaluator."""

import json
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_run import MODEL, run_program
from toy_classifier import ToyClassifier, write_mnist

from triform.arch import build, flops, load
from triform.arch.data.mnist import Mnist
from triform.arch.evaluation import evaluate_classifier, wilson_interval
from triform.arch.export import export
from triform.arch.folder import write_folder
from triform.arch.layout import split_model, to_stacked
from triform.arch.models.registry import find, register
from triform.arch.training import loop
from triform.arch.training.checkpoints import restore
from triform.arch.training.config import default_config
from triform.arch.training.loop import train
from triform.arch.training.losses import class_loss
from triform.arch.training.step import TrainState, make_train_step

ROOT = Path(__file__).parents[1]
LABELS = tuple("0123456789")
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_mnist(tmp_path_factory.mktemp("data") / "mnist")


def config_of(folder, **changes):
  """Changes are dotted, as in `tiny_run`."""
  config = default_config(architecture="linear_classifier", dropout=0.1)
  config.update_from_flattened_dict(
    {
      "data.path": str(folder),
      "data.held_out": 25,
      "data.permutation_seed": 3,
      "batch_size": 10,
      "total_steps": STEPS,
      "log_every_steps": 2,
      "optimizer.learning_rate": 3e-2,
      "optimizer.warmup_steps": 1,
      "eval.every_steps": 6,
      "eval.batch_size": 10,
      "checkpoint.every_steps": 4,
      "compilation_cache": False,
      "peak_flops": 1e12,
      **changes,
    }
  )
  return config


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """The work directory of a finished run."""
  workdir = tmp_path_factory.mktemp("run") / "toy"
  assert train(config_of(folder), workdir)
  return workdir


def everything_kept(workdir):
  return restore(workdir / "checkpoints", lambda saved: saved)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_tells_how_well(run):
  records = lines(run)
  trained = [record for record in records if "loss" in record]
  assert [record["step"] for record in trained] == [2, 4, 6, 8, 10, 12]
  assert list(trained[-1])[:5] == ["step", "loss", "accuracy", "learning_rate", "gradient_norm"]
  assert {"examples_per_second", "model_flops_per_second", "mfu"} <= trained[-1].keys()
  assert "tokens_per_second" not in trained[-1]
  assert trained[-1]["loss"] < 0.5 * trained[0]["loss"]
  assert trained[-1]["accuracy"] > 0.8
  evaluated = [record for record in records if "eval_loss" in record]
  assert [(r["step"], set(r) - {"eta"}) for r in evaluated] == [
    (6, {"step", "eval_loss", "eval_accuracy"}),
    (12, {"step", "eval_loss", "eval_accuracy"}),
  ]
  assert evaluated[-1]["eval_accuracy"] > 0.6
  work = flops.train_flops_per_token({"architecture": "linear_classifier"}, 784, "parallel") * 784
  last = trained[-1]
  assert last["model_flops_per_second"] == pytest.approx(last["examples_per_second"] * work)
  assert json.loads((run / "labels.json").read_text()) == list(LABELS)
  assert not (run / "tokenizer").exists()


def test_a_run_that_is_stopped_ends_bit_for_bit_like_one_that_was_not(
  run, folder, tmp_path, monkeypatch
):
  original = loop._Meter.read

  def read(self, writer, step, batch, metrics):
    original(self, writer, step, batch, metrics)
    if step == 7:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Meter, "read", read)
    assert not train(config_of(folder), tmp_path)
  assert everything_kept(tmp_path)[0] < STEPS
  assert train(config_of(folder), tmp_path)
  chex.assert_trees_all_equal(everything_kept(run), everything_kept(tmp_path))
  whole, cut = ([r["loss"] for r in lines(w) if "loss" in r] for w in (run, tmp_path))
  assert whole == cut


def test_it_is_loaded_exported_and_evaluated(run, folder, tmp_path):
  model, labels = load(run)
  assert labels == LABELS and isinstance(model, ToyClassifier)
  digits = Mnist(str(folder), held_out=25, permutation_seed=3)
  result = evaluate_classifier(model, digits.examples("validation"), form="parallel", batch_size=7)
  told = lines(run)[-1]
  assert result["examples"] == 25 and result["accuracy"] == pytest.approx(told["eval_accuracy"])
  assert result["loss"] == pytest.approx(told["eval_loss"], rel=1e-5)

  export(run, tmp_path / "folder")
  exported, labels = load(tmp_path / "folder")
  assert labels == LABELS
  description = json.loads((tmp_path / "folder" / "config.json").read_text())
  assert description["version"] == 1 and "sha256" in description["files"]["labels.json"]
  chex.assert_trees_all_equal(*(to_stacked(split_model(m)[1:]) for m in (model, exported)))

  still = {"optimizer.learning_rate": 0.0, "total_steps": 1, "seed": 1}
  for name, start in (("a", run), ("b", tmp_path / "folder")):
    train(config_of(folder, init_from=str(start), **still), tmp_path / name)
    first, second = everything_kept(run)[1], everything_kept(tmp_path / name)[1]
    for leaf in (leaf for leaf in first if leaf.startswith("params/")):
      np.testing.assert_array_equal(first[leaf], second[leaf])


def test_epochs_the_best_checkpoint_and_several_parts(folder, tmp_path):
  changes = {"accumulate": 2, "checkpoint.best": True, "average_decay": 0.5, "data.workers": 1}
  config = config_of(folder, total_steps=None, total_epochs=0.5, label_smoothing=0.1, **changes)
  assert train(config, tmp_path)
  assert lines(tmp_path)[-1]["step"] == 5  # half of 95 examples, ten at a time
  step, kept = restore(tmp_path / "best", lambda saved: saved)
  assert step == 5
  assert float(kept["evaluation_loss"]) == pytest.approx(lines(tmp_path)[-1]["eval_loss"])
  params = to_stacked(split_model(load(tmp_path, best=True)[0])[1])
  np.testing.assert_array_equal(params["kernel"], kept["average/kernel"])


RNG = np.random.default_rng(0)
BATCH = {
  "inputs": RNG.normal(size=(4, 6, 1)).astype(np.float32),
  "targets": np.array([3, 0, 9, 3], np.int32),
  "loss_mask": np.array([True, True, True, False]),
}


def small_model(**options):
  return build({"architecture": "linear_classifier", "steps": 6, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_by_hand(smoothing):
  """Of three rows; what a row that does not count holds is of no matter."""
  model = small_model()
  mask = RNG.random((4, 6)) < 0.7
  call = {"form": "parallel", "rngs": None, "label_smoothing": smoothing}
  objective, sums = class_loss(model, {**BATCH, "mask": mask}, **call)
  logits, _ = model(BATCH["inputs"], mask=mask)
  log_shares = np.asarray(jax.nn.log_softmax(logits))[:3]
  nats = -log_shares[range(3), BATCH["targets"][:3]]
  smooth = (1 - smoothing) * nats - smoothing * log_shares.mean(axis=-1)
  np.testing.assert_allclose(objective, smooth.sum(), rtol=1e-5)
  np.testing.assert_allclose(sums["loss"], nats.sum(), rtol=1e-5)
  assert sums["accuracy"] == (log_shares.argmax(axis=-1) == BATCH["targets"][:3]).sum()


def test_a_step_in_parts_is_the_step():
  """But for batch statistics, which are of parts then."""
  update, results = optax.sgd(1.0), []
  batch = {name: np.concatenate([a, a]) for name, a in BATCH.items()}
  for parts in (1, 2):
    model = small_model()
    model.norm = RowsAlone()
    graphdef, params, variables = split_model(model)
    step = make_train_step(
      graphdef, update, form="parallel", seed=0, loss=class_loss, accumulate=parts
    )
    state = TrainState(params, variables, update.init(params))
    results.append(jax.jit(step)(state, batch, np.int32(0)))
  chex.assert_trees_all_close(results[0][0].params, results[1][0].params, atol=1e-6)
  np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-6)
  assert results[0][1]["accuracy"] == results[1][1]["accuracy"]


class RowsAlone(nnx.Module):
  """In the place of batch norm."""

  num_features = 16

  def __call__(self, x, use_running_average):
    return x


class Answers(nnx.Module):
  """Logits that are the inputs of the first step."""

  def __call__(self, x, state=None, *, form="parallel", mask=None, rngs=None):
    return x[:, 0], ()


class Examples:
  """Five, of which the likeliest class is right in three."""

  logits = np.log(
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]
  )
  targets = (0, 1, 2, 1, 2)

  def __len__(self):
    return 5

  def __getitem__(self, i):
    inputs = self.logits[i][None].astype(np.float32)
    return {"inputs": inputs, "targets": np.int32(self.targets[i]), "loss_mask": np.bool_(True)}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_accuracy_and_loss_by_hand_whatever_the_last_batch_lacks(batch_size):
  result = evaluate_classifier(Answers(), Examples(), batch_size=batch_size)
  shares = [0.7, 0.8, 0.4, 0.3, 0.3]
  assert result["loss"] == pytest.approx(-np.log(shares).mean(), rel=1e-6)
  assert (result["accuracy"], result["examples"]) == (0.6, 5)
  assert result["interval"] == wilson_interval(3, 5)


@pytest.mark.parametrize(
  ("right", "total", "low", "high"),
  [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0),
  ],
)
def test_intervals_are_those_of_a_published_table(right, total, low, high):
  """Newcombe, Statistics in Medicine 17 (1998), table I, method 3, and one end mirrored."""
  assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"data.path": None}, "data.path is None, expected the folder"),
    ({"data.name": "minst"}, "data.name is 'minst', expected one of mnist"),
    ({"data.held_out": 0}, "data.held_out is 0, expected at least 1"),
    ({"model.num_classes": 12}, "model.num_classes is 12, expected that of mnist, 10"),
    ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ({"eval.batch_size": 0}, r"eval.batch_size is 0, expected at least 1"),
    ({"accumulate": 3}, "batch_size is 10, expected a multiple of .* accumulate=3"),
    ({"form": "serial"}, "form is 'serial', expected one of parallel"),
  ],
)
def test_bad_configurations_are_refused_before_training(folder, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    train(config_of(folder, **change), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_fields_are_those_that_mean_something(folder):
  config = config_of(folder)
  absent = {"seq_len", "total_tokens", "z_loss"}
  assert not absent & set(config) and "tokenizer" not in config.data
  assert set(config.eval) == {"form", "every_steps", "batch_size"}
  assert absent <= set(default_config(**MODEL))
  assert "label_smoothing" not in default_config(**MODEL)


def test_a_run_keeps_its_order_of_pixels_and_its_classes(run, folder, tmp_path):
  for name, value in (("permutation_seed", 4), ("held_out", 20)):
    with pytest.raises(ValueError, match=rf"data.{name}: saved \d+, given {value}"):
      train(config_of(folder, **{f"data.{name}": value}), run)
  model, _ = load(run)
  config = config_of(folder)
  tensors = to_stacked(dict(zip(("params", "variables"), split_model(model)[1:], strict=True)))
  labels = tuple("abcdefghij")
  write_folder(tmp_path / "other", config=config, tensors=tensors, vocabulary=labels, step=1)
  assert load(tmp_path / "other")[1] == labels
  with pytest.raises(
    ValueError, match=r"knows the classes a, b, .* expected those of the data, 0,"
  ):
    train(config_of(folder, init_from=str(tmp_path / "other")), tmp_path / "new")
  (tmp_path / "other" / "labels.json").write_text("{}")
  with pytest.raises(ValueError, match=r"labels.json has 2 bytes"):
    load(tmp_path / "other")


def test_a_task_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="task is 'sorting', expected one of language, classif"):
    register("other", small={}, task="sorting")
  assert find("retnet").task == "language"


PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import toy_classifier
sys.argv = [{str(ROOT / "eval.py")!r}, *sys.argv[1:]]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def run_eval(folder, *arguments):
  """`eval.py`, which knows the toy architecture."""
  return run_program(folder, "-c", PROGRAM, *arguments)


def test_eval_tells_the_accuracy(run, folder, tmp_path):
  arguments = f"--workdir={run}", "--json=out.json", "--form=recurrent"
  done = run_eval(tmp_path, *arguments)
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "out.json").read_text())
  assert (result["examples"], result["split"], result["form"]) == (30, "test", "recurrent")
  low, high = result["interval"]
  assert 0 < low < result["accuracy"] < high <= 1
  assert f"accuracy        {result['accuracy']:,.6g}\n" in done.stdout
  assert f"interval        {low:,.6g} to {high:,.6g}\n" in done.stdout
  done = run_eval(tmp_path, *arguments, "--split=validation")
  result = json.loads((tmp_path / "out.json").read_text())
  assert result["loss"] == pytest.approx(lines(run)[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--task=loss", "toy, expected --task=accuracy"),
    ("--text=README.md", "--text is not for a classifier such as "),
    ("--config.data.path=nowhere", "data.path is nowhere, expected the folder"),
  ],
)
def test_a_mistake_in_evaluation_is_one_line(run, tmp_path, argument, message):
  done = run_eval(tmp_path, f"--workdir={run}", argument)
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert message in done.stderr
