"""From runs to exported folders, and where these may be written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from exported import IDS, MEAN, QUERY, finished_run, leaves_of, random_folder, same
from flax import nnx
from ml_collections import ConfigDict
from tiny_run import run_program
from toy import ToyBlock

from triform.arch import build, folder, load
from triform.arch.data.tokenizers import ByteTokenizer
from triform.arch.export import export
from triform.arch.folder import read_folder
from triform.arch.loading import initial_parameters, load_config
from triform.arch.models.language_model import LanguageModel
from triform.arch.models.registry import ARCHITECTURES, Architecture
from triform.arch.training import workdir as workdirs
from triform.arch.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run):
  export(run, run.parent / "exported")
  return run.parent / "exported"


def test_an_exported_run_is_the_run(run, exported):
  model, tokenizer = load(exported)
  same(model, load(run)[0])
  assert not model.stack.scan
  assert tokenizer.fingerprint == load(run)[1].fingerprint
  description = json.loads((exported / "config.json").read_text())
  assert description["version"] == 1 and description["step"] == 12
  assert description["tensors"]["params/stack/layers/mixer/query/kernel"]["shape"] == [2, 16, 16]
  saved = load_config(exported)
  assert saved.optimizer == load_config(run).optimizer


def test_an_earlier_step(run, tmp_path):
  assert export(run, tmp_path / "early", step=8) == 8
  assert read_folder(tmp_path / "early").step == 8
  same(load(tmp_path / "early")[0], load(run, step=8)[0])
  with pytest.raises(ValueError, match=r"early holds the model after step 8, not 12"):
    load(tmp_path / "early", step=12)
  with pytest.raises(ValueError, match=r"expected a checkpoint of step 9 in .*, found steps"):
    export(run, tmp_path / "none", step=9)
  assert not (tmp_path / "none").exists()


def test_the_average_is_taken_where_a_run_kept_one(run, tmp_path):
  shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
  params = {n: leaf for n, leaf in leaves_of(load(run)[0]).items() if n.startswith("params/")}
  average = {n.replace("params/", "average/"): leaf + 1 for n, leaf in params.items()}
  with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, {**params, **average, "optimizer/count": jnp.zeros((), jnp.int32)})
  export(tmp_path / "run", tmp_path / "folder")
  for path in (tmp_path / "run", tmp_path / "folder"):
    got = leaves_of(load(path)[0])
    for name, leaf in params.items():
      np.testing.assert_array_equal(got[name], np.asarray(leaf) + 1)


@pytest.fixture
def toy(monkeypatch):
  """The configuration of a model with batch statistics, which are not parameters."""

  class Toy(LanguageModel):
    def __init__(self, *, d_model=8, num_layers=2, scan_layers=None, param_dtype="float32", rngs):
      dtypes = {"dtype": jnp.float32, "param_dtype": param_dtype}
      super().__init__(
        lambda rngs: ToyBlock(d_model, **dtypes, rngs=rngs),
        vocab_size=257,
        d_model=d_model,
        num_layers=num_layers,
        norm=nnx.RMSNorm(d_model, rngs=rngs),
        embedding_init=nnx.initializers.normal(1.0),
        scan_layers=scan_layers,
        **dtypes,
        rngs=rngs,
      )

  monkeypatch.setitem(ARCHITECTURES, "toy", Architecture(Toy))
  return {"architecture": "toy"}


def write_workdir(path, config, leaves):
  workdirs.prepare(path, config)
  ByteTokenizer().save(path / "tokenizer")
  with Checkpoints(path / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, leaves)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_statistics_travel_with_the_parameters(tmp_path, toy, param_dtype):
  options = {**toy, "param_dtype": param_dtype, "scan_layers": True}
  model = build(options, rngs=nnx.Rngs(0))
  model(IDS, rngs=nnx.Rngs(1))  # training: the statistics are those of these tokens now
  leaves = leaves_of(model)
  assert float(jnp.abs(leaves[MEAN]).max()) > 0
  write_workdir(tmp_path / "run", ConfigDict({"model": options}), leaves)
  export(tmp_path / "run", tmp_path / "folder")
  for path in (tmp_path / "run", tmp_path / "folder"):
    same(load(path)[0], model)
    initial, _ = initial_parameters(path, options)
    np.testing.assert_array_equal(initial[MEAN], leaves[MEAN])
    assert initial[QUERY].dtype == param_dtype


def test_a_run_without_the_statistics_is_refused(tmp_path, toy):
  leaves = leaves_of(build({**toy, "scan_layers": True}, rngs=nnx.Rngs(0)))
  leaves.pop(MEAN)
  write_workdir(tmp_path / "run", ConfigDict({"model": toy}), leaves)
  for read in (lambda p: load(p), lambda p: initial_parameters(p, toy)):
    with pytest.raises(ValueError, match=rf"{MEAN}: nothing, expected .*\[2, 8\]"):
      read(tmp_path / "run")


def test_what_is_not_an_exported_folder_is_not_replaced(run, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=f"{tmp_path} exists and is not an exported folder"):
    export(run, tmp_path)
  with pytest.raises(ValueError, match=r"tiny exists and is not an exported folder"):
    export(run, run)
  with pytest.raises(ValueError, match=r"notes.txt exists and is not an exported folder"):
    export(run, tmp_path / "notes.txt")
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_exported_folder_is_replaced_whole(tmp_path):
  random_folder(tmp_path / "m")
  (tmp_path / "m" / "left_over.txt").write_text("old")
  model = random_folder(tmp_path / "m", ffn_dim=24)
  assert not (tmp_path / "m" / "left_over.txt").exists()
  same(load(tmp_path / "m")[0], model)
  (tmp_path / "empty").mkdir()
  random_folder(tmp_path / "empty")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  old = random_folder(tmp_path / "m")

  def fail(path):
    raise OSError("disk full")

  monkeypatch.setattr(folder, "_sync", fail)
  for name in ("m", "new"):
    with pytest.raises(OSError, match="disk full"):
      random_folder(tmp_path / name, ffn_dim=24)
  assert [path.name for path in tmp_path.iterdir()] == ["m"]
  same(load(tmp_path / "m")[0], old)


def test_a_killed_export_leaves_no_half_folder(tmp_path):
  program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import exported
from triform.arch import folder
folder._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
exported.random_folder(sys.argv[1])
"""
  arguments = [sys.executable, "-c", program, str(tmp_path / "m")]
  done = subprocess.run(arguments, capture_output=True, text=True)
  assert done.returncode == -9, done.stderr
  assert not (tmp_path / "m").exists()
  with pytest.raises(ValueError, match=r"m/config.json not found"):
    load(tmp_path / "m")


@pytest.mark.slow
def test_export_and_eval_programs(run):
  here = run.parents[1]
  export = ["-m", "triform.arch.export", "--workdir=runs/tiny", "--to=out/model"]
  done = run_program(here, *export)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "out/model holds the model of runs/tiny after step 12\n"
  results = []
  for workdir in ("runs/tiny", "out/model"):
    done = run_program(
      here, str(ROOT / "eval.py"), f"--workdir={workdir}", "--text=stdlib", "--json=out.json",
      "--config.eval.max_tokens=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results.append(json.loads((here / "out.json").read_text()))
  assert results[0] == results[1] and results[0]["tokens"] == 64
  for arguments, message in (
    (
      ("-m", "triform.arch.export", "--workdir=runs/tiny", "--to=runs"),
      "is not an exported folder",
    ),
    (("-m", "triform.arch.export", "--workdir=runs/no", "--to=x"), "runs/no/config.json not found"),
  ):
    done = run_program(here, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr
