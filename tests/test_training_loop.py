import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from tiny_run import tiny_config, use_corpus, write_corpus

from triform.arch import build, load
from triform.arch.data import python_stdlib
from triform.arch.data.text import load_text
from triform.arch.layout import split_model, to_stacked
from triform.arch.loading import InitialParameters
from triform.arch.training import loop
from triform.arch.training.checkpoints import restore
from triform.arch.training.loop import NonFiniteError, train

CHILD_STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  root = tmp_path_factory.mktemp("run") / "stdlib"
  write_corpus(root)
  return root


@pytest.fixture(autouse=True)
def small_stdlib(corpus, monkeypatch):
  monkeypatch.setattr(python_stdlib, "stdlib_root", python_stdlib.stdlib_root)
  use_corpus(corpus)


def config_of(corpus, **changes):
  return tiny_config(corpus.parent, **changes)


def everything_kept(workdir):
  return restore(workdir / "checkpoints", lambda saved: saved)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_resumed_ends_bit_for_bit_like_one_that_was_not(corpus, tmp_path):
  train(config_of(corpus), tmp_path / "whole")
  train_until(7, config_of(corpus), tmp_path / "cut")
  train(config_of(corpus), tmp_path / "cut")
  whole, cut = everything_kept(tmp_path / "whole"), everything_kept(tmp_path / "cut")
  assert whole[0] == cut[0] == 12
  chex.assert_trees_all_equal(whole[1], cut[1])
  losses = [[r["loss"] for r in lines(tmp_path / n) if "loss" in r] for n in ("whole", "cut")]
  assert losses[0] == losses[1]


def train_until(steps, config, workdir):
  """Trains until the metrics of step `steps` are read, then raises SIGTERM in this process."""
  original = loop._Meter.read

  def read(self, writer, step, batch, metrics):
    original(self, writer, step, batch, metrics)
    if step == steps:
      signal.raise_signal(signal.SIGTERM)

  loop._Meter.read = read
  try:
    assert not train(config, workdir)
  finally:
    loop._Meter.read = original


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
  """The work directory of a process that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train_child(corpus, workdir, CHILD_STEPS)
  return workdir


@pytest.mark.parametrize(
  "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_process_resumes_bit_for_bit(corpus, whole, tmp_path, number):
  steps, victim = CHILD_STEPS, random.Random().randrange(6, CHILD_STEPS - 5)
  print(f"killed at step {victim}")  # shown if the test fails
  child = start_child(corpus, tmp_path / "cut", steps)
  for line in child.stdout:
    if line.startswith(f"step {victim}/"):
      child.send_signal(number)
      break
  rest = child.communicate(timeout=120)[0]
  if number == signal.SIGTERM:
    assert child.returncode == 0 and "stopped" in rest
    assert everything_kept(tmp_path / "cut")[0] >= victim
  else:
    assert child.returncode == -signal.SIGKILL
  train_child(corpus, tmp_path / "cut", steps)
  expected, resumed = everything_kept(whole), everything_kept(tmp_path / "cut")
  assert expected[0] == resumed[0] == steps
  chex.assert_trees_all_equal(expected[1], resumed[1])
  logged = [[r["step"] for r in lines(run) if "loss" in r] for run in (whole, tmp_path / "cut")]
  assert logged[0] == logged[1] == list(range(1, steps + 1))


def start_child(corpus, workdir, steps):
  command = [
    sys.executable,
    str(Path(__file__).with_name("tiny_run.py")),
    str(corpus),
    str(workdir),
    str(steps),
  ]
  return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def train_child(corpus, workdir, steps):
  child = start_child(corpus, workdir, steps)
  output = child.communicate(timeout=120)[0]
  assert child.returncode == 0 and "done" in output


def test_a_truncated_newest_checkpoint_is_passed_over(corpus, tmp_path, caplog):
  train(config_of(corpus), tmp_path)
  newest = tmp_path / "checkpoints" / "12"
  file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
  file.write_bytes(file.read_bytes()[:-10])
  kept = everything_kept_after_training_again(corpus, tmp_path)
  assert "cannot be read" in caplog.text and str(newest) in caplog.text
  assert kept[0] == 12


def everything_kept_after_training_again(corpus, workdir):
  assert train(config_of(corpus), workdir)
  return everything_kept(workdir)


def test_another_model_is_refused(corpus, tmp_path):
  train(config_of(corpus, total_steps=4), tmp_path)
  with pytest.raises(ValueError, match=r"model\.d_model: saved 16, given 32"):
    train(config_of(corpus, **{"model.d_model": 32}), tmp_path)


def test_a_non_finite_step_stops_the_run_and_spoils_nothing(corpus, tmp_path):
  train(config_of(corpus, total_steps=5), tmp_path)
  before = everything_kept(tmp_path)
  poison = config_of(corpus, **{"optimizer.learning_rate": float("inf"), "total_steps": 9})
  with pytest.raises(NonFiniteError, match=r"nonfinite\.json"):
    train(poison, tmp_path)
  identity = json.loads((tmp_path / "nonfinite.json").read_text())
  assert identity["step"] > 5 and np.shape(identity["inputs"]) == (2, 16)
  after = everything_kept(tmp_path)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after[1]))
  assert after[0] >= before[0]


def test_metrics_are_complete(corpus, tmp_path):
  train(config_of(corpus), tmp_path)
  records = lines(tmp_path)
  trained = [r for r in records if "loss" in r]
  assert [r["step"] for r in trained] == [2, 4, 6, 8, 10, 12]
  fields = {
    "step", "loss", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second",
    "model_flops_per_second", "mfu",
  }  # fmt: skip
  assert fields <= set(trained[-1])
  assert [r["step"] for r in records if "eval_loss" in r] == [6, 12]
  assert trained[-1]["loss"] < trained[0]["loss"]
  table = (tmp_path / "parameters.txt").read_text()
  assert "stack.layers.0.mixer.query.kernel" in table
  assert {"config.json", "versions.json", "tensorboard"} <= {f.name for f in tmp_path.iterdir()}


def test_scanned_and_unrolled_layers_share_checkpoints_and_steps(corpus, tmp_path):
  """A run may change its layout: files are the same, and so is the arithmetic, to rounding."""
  for name, scan in (("unrolled", False), ("scanned", True)):
    train(config_of(corpus, **{"model.scan_layers": scan}), tmp_path / name)
  unrolled, scanned = (everything_kept(tmp_path / n)[1] for n in ("unrolled", "scanned"))
  chex.assert_trees_all_close(unrolled, scanned, rtol=1e-3, atol=1e-5)


def test_load_returns_the_trained_model(corpus, tmp_path):
  train(config_of(corpus), tmp_path)
  model, tokenizer = load(tmp_path)
  _, kept = everything_kept(tmp_path)
  _, params, _ = split_model(model)
  np.testing.assert_array_equal(
    params["embedding"]["embedding"], kept["params/embedding/embedding"]
  )
  fresh = build(config_of(corpus).model, rngs=nnx.Rngs(0))
  ids = tokenizer.encode("name1 = 2\n")[None]
  assert not np.allclose(model(ids)[0], fresh(ids)[0])


def test_the_average_is_what_is_evaluated_and_loaded(corpus, tmp_path):
  train(config_of(corpus, average_decay=0.5), tmp_path)
  _, kept = everything_kept(tmp_path)
  name = "embedding/embedding"
  assert np.abs(kept[f"average/{name}"] - kept[f"params/{name}"]).max() > 0
  params = to_stacked(split_model(load(tmp_path)[0])[1])
  np.testing.assert_array_equal(params[name], kept[f"average/{name}"])


def test_the_checkpoint_of_the_lowest_loss_is_kept(corpus, tmp_path):
  """A learning rate that jumps at the end spoils the last one."""
  changes = {"eval.every_steps": 2, "checkpoint.best": True, "optimizer.schedule": "rsqrt"}
  train(config_of(corpus, total_steps=8, **changes), tmp_path)
  spoilt = {**changes, "optimizer.learning_rate": 10.0}
  train(config_of(corpus, total_steps=12, **spoilt), tmp_path)
  losses = {r["step"]: r["eval_loss"] for r in lines(tmp_path) if "eval_loss" in r}
  best = min(losses, key=losses.get)
  assert best < 12
  step, kept = restore(tmp_path / "best", lambda saved: saved)
  assert step == best and float(kept["evaluation_loss"]) == pytest.approx(losses[best], rel=1e-6)
  params = to_stacked(split_model(load(tmp_path, best=True)[0])[1])
  np.testing.assert_array_equal(params["norm/scale"], kept["params/norm/scale"])


@pytest.mark.parametrize(
  ("change", "steps"), [({"total_tokens": 5 * 2 * 16 - 1}, 5), ({"total_epochs": 0.01}, None)]
)
def test_length_in_tokens_or_epochs(corpus, tmp_path, change, steps):
  config = config_of(corpus, **{"total_steps": None, **change})
  assert train(config, tmp_path)
  data = load_text(config.data, config.model.vocab_size)
  steps = steps or data.batches(seq_len=16, batch_size=2, seed=0).steps(0.01)
  assert lines(tmp_path)[-1]["step"] == everything_kept(tmp_path)[0] == steps


def test_a_run_starts_from_another_runs_parameters(corpus, tmp_path):
  train(config_of(corpus), tmp_path / "first")
  still = {"optimizer.learning_rate": 0.0, "total_steps": 1, "seed": 1}
  train(config_of(corpus, init_from=str(tmp_path / "first"), **still), tmp_path / "second")
  first, second = (everything_kept(tmp_path / name)[1] for name in ("first", "second"))
  for name in (name for name in first if name.startswith("params/")):
    np.testing.assert_array_equal(first[name], second[name])
  other = config_of(corpus, init_from=str(tmp_path / "first"), **{"model.d_model": 32})
  with pytest.raises(ValueError, match=r"model\.d_model: 16, given 32"):
    train(other, tmp_path / "third")


def test_parameters_without_their_tokenizer_are_refused(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "initial_parameters", lambda *_: InitialParameters({}, None))
  config = config_of(corpus, init_from="weights", **{"data.tokenizer": "sentencepiece"})
  with pytest.raises(ValueError, match="weights has parameters but no tokenizer"):
    train(config, tmp_path)


def test_a_finished_run_is_left_alone(corpus, tmp_path, capsys):
  train(config_of(corpus), tmp_path)
  before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.json*")}
  assert train(config_of(corpus, log_every_steps=1), tmp_path)
  assert "trained to step 12 of 12" in capsys.readouterr().out
  assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.json*")} == before
  assert train(config_of(corpus, total_steps=14), tmp_path)
  assert everything_kept(tmp_path)[0] == 14


def test_profile_writes_a_trace(corpus, tmp_path):
  train(config_of(corpus, total_steps=14), tmp_path, profile=True)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"form": "serial"}, "form is 'serial', expected one of parallel, chunkwise, recurrent"),
    ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ({"checkpoint.keep": 0}, "checkpoint.keep is 0, expected at least 1"),
    ({"accumulate": 3}, "batch_size is 2, expected a multiple of .* accumulate=3"),
    ({"mesh": "fsdp=64"}, "mesh is 'fsdp=64' of 64 devices"),
    ({"optimizer.name": "sgdx"}, "optimizer.name is 'sgdx', expected one of adamw, lion"),
    ({"sharding_rules": ((r"^nothing$", ()),)}, "no sharding rule matches parameter"),
    ({"total_epochs": 1.0}, "is total_steps=12 and total_epochs=1.0, expected one of total_steps,"),
    ({"total_steps": None}, "the length of the run is nothing, expected one of total_steps,"),
    ({"total_steps": 0}, "total_steps is 0, expected more than 0"),
    ({"model.remat": "some"}, "remat is 'some', expected one of none, dots, full"),
    ({"model.vocab_size": 100}, "needs vocab_size >= 257"),
  ],
)
def test_bad_configurations_are_refused_before_training(corpus, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    train(config_of(corpus, **change), tmp_path / "new")
