"""Exported folders: what is written, read back, and refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from tiny_run import tiny_config, use_corpus, write_corpus
from toy import ToyBlock

from triform.arch import build, folder, load, tensors
from triform.arch.data import python_stdlib
from triform.arch.data.tokenizers import ByteTokenizer, train_sentencepiece
from triform.arch.export import export
from triform.arch.folder import read_folder, write_folder
from triform.arch.layout import split_model, to_stacked
from triform.arch.loading import initial_parameters, load_config
from triform.arch.models import ARCHITECTURES
from triform.arch.models.language_model import LanguageModel
from triform.arch.training import workdir as workdirs
from triform.arch.training.checkpoints import Checkpoints
from triform.arch.training.loop import train

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
MODEL = {
  "architecture": "retnet",
  "vocab_size": 257,
  "d_model": 8,
  "num_layers": 2,
  "num_heads": 2,
  "value_dim": 16,
  "ffn_dim": 8,
  "scan_layers": True,
}
IDS = np.arange(1, 13)[None]
QUERY = "params/stack/layers/mixer/query/kernel"
SCALE = "params/norm/scale"
MEAN = "variables/stack/layers/norm/mean"


def leaves_of(model):
  _, params, variables = split_model(model)
  return to_stacked({"params": params, "variables": variables})


def write(path, **model):
  """An exported folder of a random model, and the model."""
  options = {**MODEL, **model}
  model = build(options, rngs=nnx.Rngs(0))
  params = {"params": split_model(model)[1]}
  config = ConfigDict({"model": options, "seq_len": 16})
  write_folder(path, config=config, tensors=to_stacked(params), tokenizer=ByteTokenizer(), step=7)
  return model


def same(a, b):
  a, b = leaves_of(a), leaves_of(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run, as a user has it: a folder `runs/tiny` beside the corpus."""
  here = tmp_path_factory.mktemp("run")
  write_corpus(here / "stdlib")
  before = python_stdlib.stdlib_root
  use_corpus(here / "stdlib")
  train(tiny_config(here), here / "runs" / "tiny")
  python_stdlib.stdlib_root = before
  return here / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(run):
  export(run, run.parent / "exported")
  return run.parent / "exported"


# What is written and read


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
  assert saved.model.decay == "fixed"  # completed: the run's own has not said it
  assert "decay" not in load_config(run).model


def test_an_earlier_step(run, tmp_path):
  export(run, tmp_path / "early", step=8)
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
  with Checkpoints(tmp_path / "run" / "checkpoints", every_steps=1, keep=1) as checkpoints:
    checkpoints.save(1, {**params, **average, "optimizer/count": jnp.zeros((), jnp.int32)})
  export(tmp_path / "run", tmp_path / "folder")
  for path in (tmp_path / "run", tmp_path / "folder"):
    got = leaves_of(load(path)[0])
    for name, leaf in params.items():
      np.testing.assert_array_equal(got[name], np.asarray(leaf) + 1)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_parameters_are_exact(tmp_path, param_dtype, scan_layers):
  model = write(tmp_path / "m", param_dtype=param_dtype, scan_layers=scan_layers, decay="learned")
  loaded, _ = load(tmp_path / "m")
  assert loaded.embedding.embedding[...].dtype == param_dtype
  same(loaded, model)
  np.testing.assert_array_equal(loaded(IDS)[0], build_unrolled(model, param_dtype)(IDS)[0])


def build_unrolled(model, param_dtype):
  options = {**MODEL, "param_dtype": param_dtype, "decay": "learned", "scan_layers": False}
  return build(options, rngs=nnx.Rngs(0))


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

  monkeypatch.setitem(ARCHITECTURES, "toy", Toy)
  return {"architecture": "toy"}


def write_workdir(path, config, leaves):
  workdirs.prepare(path, config)
  ByteTokenizer().save(path / "tokenizer")
  with Checkpoints(path / "checkpoints", every_steps=1, keep=1) as checkpoints:
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


def test_tokenizers_travel(tmp_path):
  text = "".join(f"value{i % 37} = {i * i}\n" for i in range(400))
  tokenizer = train_sentencepiece([text], 300, tmp_path / "cache")
  config = ConfigDict({"model": {**MODEL, "vocab_size": 300}})
  params = {"params": split_model(build(config.model, rngs=nnx.Rngs(0)))[1]}
  write_folder(
    tmp_path / "m", config=config, tensors=to_stacked(params), tokenizer=tokenizer, step=0
  )
  _, loaded = load(tmp_path / "m")
  np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_large_models_are_in_several_files(tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, "SHARD_BYTES", 3000)
  model = write(tmp_path / "m")
  files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  same(load(tmp_path / "m")[0], model)
  (tmp_path / "m" / files[1]).unlink()
  with pytest.raises(ValueError, match=rf"{files[1]} is missing"):
    load(tmp_path / "m")


def test_a_config_given_replaces_the_folders(tmp_path):
  write(tmp_path / "m")
  config = load_config(tmp_path / "m")
  config.model.dtype = config.model.param_dtype = "bfloat16"
  model, _ = load(tmp_path / "m", config=config)
  assert model.embedding.embedding[...].dtype == jnp.bfloat16
  config.model.ffn_dim = 24
  with pytest.raises(ValueError) as caught:
    load(tmp_path / "m", config=config)
  assert "feed_forward/gate/kernel: [2, 8, 8], expected [2, 8, 24]" in str(caught.value)
  assert "mixer" not in str(caught.value)


def test_an_option_that_an_older_folder_lacks_has_its_default(tmp_path):
  model = write(tmp_path / "m", eps=1e-6)
  edit(tmp_path / "m", lambda d: d["config"]["model"].pop("eps"))
  loaded, _ = load(tmp_path / "m")
  same(loaded, model)
  assert loaded.stack.layers[0].mixer.eps == 1e-6


def test_loading_a_folder_needs_no_trainer(tmp_path):
  write(tmp_path / "m")
  program = """
import sys
from triform.arch import load
load(sys.argv[1])
print(*sys.modules)
"""
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "m")], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  loaded = {name.partition(".")[0] for name in done.stdout.split()}
  assert not loaded & {"orbax", "grain", "tensorflow_datasets", "tensorboardX", "torch"}


# Where it is written


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
  write(tmp_path / "m")
  (tmp_path / "m" / "left_over.txt").write_text("old")
  model = write(tmp_path / "m", ffn_dim=24)
  assert not (tmp_path / "m" / "left_over.txt").exists()
  same(load(tmp_path / "m")[0], model)
  (tmp_path / "empty").mkdir()
  write(tmp_path / "empty")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  old = write(tmp_path / "m")

  def fail(path):
    raise OSError("disk full")

  monkeypatch.setattr(folder, "_sync", fail)
  for name in ("m", "new"):
    with pytest.raises(OSError, match="disk full"):
      write(tmp_path / name, ffn_dim=24)
  assert [path.name for path in tmp_path.iterdir()] == ["m"]
  same(load(tmp_path / "m")[0], old)


def test_a_killed_export_leaves_no_half_folder(tmp_path):
  program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_export
from triform.arch import folder
folder._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
test_export.write(sys.argv[1])
"""
  arguments = [sys.executable, "-c", program, str(tmp_path / "m")]
  done = subprocess.run(arguments, capture_output=True, text=True)
  assert done.returncode == -9, done.stderr
  assert not (tmp_path / "m").exists()
  with pytest.raises(ValueError, match=r"m/config.json not found"):
    load(tmp_path / "m")


# What is refused


def edit(path, change):
  config = path / "config.json"
  description = json.loads(config.read_text())
  change(description)
  config.write_text(json.dumps(description))


def flip(path, offset):
  data = bytearray(path.read_bytes())
  data[offset] ^= 1
  path.write_bytes(data)


def rewrite(path, change):
  """Changes the tensors of a folder and the size of their file, not their description."""
  from safetensors.numpy import load_file, save_file

  file = path / "model.safetensors"
  arrays = load_file(file)
  change(arrays)
  save_file(arrays, file)
  edit(path, lambda d: d["files"]["model.safetensors"].update(size=file.stat().st_size))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda p: (p / "config.json").unlink(), "config.json not found"),
    (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read: "),
    (lambda p: (p / "config.json").write_text("[]"), "config.json has no model"),
    (lambda p: (p / "config.json").write_text("{}"), "config.json has no model"),
    (lambda p: edit(p, lambda d: d.pop("tensors")), "config.json: tensors is None, expected dict"),
    (lambda p: edit(p, lambda d: d.pop("version")), "config.json: version is None, expected int"),
    (
      lambda p: edit(p, lambda d: d.update(version=2, triform="9.9")),
      "has folder version 2, written by triform 9.9; this triform reads versions up to 1",
    ),
    (
      lambda p: edit(p, lambda d: d["config"]["model"].update(architecture="retnet9")),
      "architecture is 'retnet9', expected one of retnet",
    ),
    (
      lambda p: edit(p, lambda d: d["config"]["model"].update(extra=1)),
      "model option 'extra' is unknown to retnet",
    ),
    (
      lambda p: edit(p, lambda d: d["config"].pop("model")),
      "config.json: config has no model",
    ),
    (
      lambda p: edit(p, lambda d: d["config"]["model"].update(ffn_dim=24)),
      r"feed_forward/gate/kernel: float32\[2, 8, 8\], expected float32\[2, 8, 24\]",
    ),
    (
      lambda p: edit(p, lambda d: d["config"]["model"].update(param_dtype="bfloat16")),
      rf"{SCALE}: float32\[8\], expected bfloat16\[8\]",
    ),
    (
      lambda p: edit(p, lambda d: d["config"]["model"].update(tie_embeddings=True)),
      r"params/head/kernel: float32\[8, 257\], expected nothing",
    ),
    (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    (
      lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()[:-100]
      ),
      r"model.safetensors has \d+ bytes, expected \d+",
    ),
    (lambda p: flip(p / "model.safetensors", 20), "model.safetensors cannot be read|tensor"),
    (lambda p: flip(p / "model.safetensors", 3), "model.safetensors cannot be read"),
    (lambda p: flip(p / "model.safetensors", -1), r"tensor params/\S+ is damaged: its sha256 is"),
    (
      lambda p: rewrite(p, lambda a: a.update({SCALE: a[SCALE] + 1})),
      rf"tensor {SCALE} is damaged: its sha256 is \w+, expected \w+",
    ),
    (lambda p: rewrite(p, lambda a: a.pop(SCALE)), rf"tensor {SCALE} is in config.json alone"),
    (lambda p: rewrite(p, lambda a: a.update(x=a[SCALE])), "tensor x is in its files alone"),
    (
      lambda p: rewrite(p, lambda a: a.update({QUERY: a[QUERY][:, :4]})),
      rf"tensor {QUERY} is float32\[2, 4, 8\], expected float32\[2, 8, 8\]",
    ),
    (
      lambda p: rewrite(p, lambda a: a.update({SCALE: a[SCALE].astype(np.float16)})),
      rf"tensor {SCALE} is float16\[8\], expected float32\[8\]",
    ),
    (lambda p: edit(p, lambda d: d["tensors"].update({SCALE: 3})), rf"{SCALE} is described by 3"),
    (lambda p: edit(p, lambda d: d["files"].update({"../x": 3})), "names '../x' with 3"),
    (lambda p: (p / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (
      lambda p: flip(p / "tokenizer" / "tokenizer.json", 3),
      "tokenizer.json is damaged: its sha256",
    ),
  ],
)
def test_damage_is_one_clear_error(tmp_path, damage, message):
  write(tmp_path / "m")
  damage(tmp_path / "m")
  with pytest.raises(ValueError, match=message):
    load(tmp_path / "m")


def test_a_digest_that_is_off_names_its_tensor(tmp_path):
  write(tmp_path / "m")
  edit(tmp_path / "m", lambda d: d["tensors"][QUERY].update(sha256="0" * 64))
  with pytest.raises(ValueError, match=rf"m: tensor {QUERY} is damaged: .*expected 0000"):
    load(tmp_path / "m")


# Programs


def program(*arguments, cwd):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "TRIFORM_DATA": str(cwd / "data")},
  )


def test_export_and_eval_programs(run):
  here = run.parents[1]
  done = program("-m", "triform.arch.export", "--workdir=runs/tiny", "--to=out/model", cwd=here)
  assert done.returncode == 0, done.stderr
  results = []
  for workdir in ("runs/tiny", "out/model"):
    done = program(
      str(ROOT / "eval.py"), f"--workdir={workdir}", "--text=stdlib", "--json=out.json",
      "--config.eval.max_tokens=64", cwd=here,
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
    done = program(*arguments, cwd=here)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr


# Where a run starts from


def test_initial_parameters_of_runs_and_folders(run, exported):
  config = load_config(run).model
  expected = leaves_of(build(config, rngs=nnx.Rngs(1)))
  trained = leaves_of(load(run)[0])
  for path in (run, exported):
    leaves, tokenizer = initial_parameters(path, config)
    assert tokenizer.fingerprint == "bytes"
    params = {name for name in expected if name.startswith("params/")}
    assert leaves.keys() == params
    for name in params:
      assert isinstance(leaves[name], np.ndarray)
      np.testing.assert_array_equal(leaves[name], trained[name])
  first, _ = initial_parameters(run, config, step=4)
  assert not np.array_equal(first[SCALE], leaves[SCALE])


def test_initial_parameters_take_the_dtype_of_the_new_run(tmp_path):
  write(tmp_path / "m")
  new = {**MODEL, "param_dtype": "bfloat16", "dropout": 0.5, "scan_layers": False, "key_dim": 8}
  leaves, _ = initial_parameters(tmp_path / "m", new)
  assert {leaf.dtype.name for leaf in leaves.values()} == {"bfloat16"}


def test_initial_parameters_of_another_model_are_refused(tmp_path):
  write(tmp_path / "m")
  with pytest.raises(ValueError) as caught:
    initial_parameters(tmp_path / "m", {**MODEL, "activation": "gelu", "ffn_dim": 24})
  assert str(caught.value).splitlines() == [
    f"{tmp_path}/m is of another model; it has",
    "  model.activation: 'silu', given 'gelu'",
    "  model.ffn_dim: 8, given 24",
  ]
  with pytest.raises(ValueError, match=r"num_kv_heads: None, given 1"):
    initial_parameters(tmp_path / "m", {**MODEL, "num_kv_heads": 1})
  with pytest.raises(ValueError, match=r"nowhere/config.json not found"):
    initial_parameters(tmp_path / "nowhere", MODEL)


# What an earlier version wrote


def test_a_folder_of_version_1_gives_its_logits(tmp_path):
  """`data/folder_v1` was written by triform 0.1.0; `make_folder_v1` tells how. Never rewrite it."""
  model, tokenizer = load(DATA / "folder_v1")
  expected = np.load(DATA / "folder_v1.npz")
  np.testing.assert_array_equal(tokenizer.encode("retention"), expected["ids"][0])
  logits, _ = model(expected["ids"])
  np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def make_folder_v1(path):
  model = write(
    path, d_model=4, num_layers=2, num_heads=2, value_dim=4, ffn_dim=4, tie_embeddings=True,
    decay_schedule="linspace", dropout=0.1,
  )  # fmt: skip
  ids = ByteTokenizer().encode("retention")[None]
  np.savez(f"{path}.npz", ids=ids, logits=np.asarray(model(ids)[0]))
