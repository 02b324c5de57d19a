"""The format of exported folders: exact, self-contained, and refused when damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import MODEL, QUERY, SCALE, random_folder, same
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from triform.arch import build, load, tensors
from triform.arch.data.tokenizers import ByteTokenizer, train_sentencepiece
from triform.arch.folder import write_folder
from triform.arch.layout import split_model, to_stacked
from triform.arch.loading import load_config

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_parameters_are_exact(tmp_path, param_dtype, scan_layers):
  model = random_folder(
    tmp_path / "m", param_dtype=param_dtype, scan_layers=scan_layers, decay="learned"
  )
  loaded, _ = load(tmp_path / "m")
  assert loaded.embedding.embedding[...].dtype == param_dtype
  same(loaded, model)


def test_tokenizers_travel(tmp_path):
  text = "".join(f"value{i % 37} = {i * i}\n" for i in range(400))
  tokenizer = train_sentencepiece([text], 300, tmp_path / "cache")
  config = ConfigDict({"model": {**MODEL, "vocab_size": 300}})
  params = {"params": split_model(build(config.model, rngs=nnx.Rngs(0)))[1]}
  write_folder(
    tmp_path / "m", config=config, tensors=to_stacked(params), vocabulary=tokenizer, step=0
  )
  _, loaded = load(tmp_path / "m")
  np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_large_models_are_in_several_files(tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, "SHARD_BYTES", 3000)
  model = random_folder(tmp_path / "m")
  files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  same(load(tmp_path / "m")[0], model)
  (tmp_path / "m" / files[1]).unlink()
  with pytest.raises(ValueError, match=rf"{files[1]} is missing"):
    load(tmp_path / "m")


def test_a_config_given_replaces_the_folders(tmp_path):
  random_folder(tmp_path / "m")
  config = load_config(tmp_path / "m")
  config.model.dtype = config.model.param_dtype = "bfloat16"
  model, _ = load(tmp_path / "m", config=config)
  assert model.embedding.embedding[...].dtype == jnp.bfloat16
  config.model.ffn_dim = 24
  with pytest.raises(ValueError) as caught:
    load(tmp_path / "m", config=config)
  assert "feed_forward/gate/kernel: [2, 8, 8], expected [2, 8, 24]" in str(caught.value)
  assert "mixer" not in str(caught.value)


def test_a_folder_says_every_option(tmp_path):
  random_folder(tmp_path / "m")
  assert "decay" not in MODEL
  assert load_config(tmp_path / "m").model.decay == "fixed"


def test_an_option_that_an_older_folder_lacks_has_its_default(tmp_path):
  model = random_folder(tmp_path / "m", eps=1e-6)
  edit(tmp_path / "m", lambda d: d["config"]["model"].pop("eps"))
  loaded, _ = load(tmp_path / "m")
  same(loaded, model)
  assert loaded.stack.layers[0].mixer.eps == 1e-6


def test_loading_a_folder_needs_no_trainer(tmp_path):
  random_folder(tmp_path / "m")
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


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
  path = tmp_path_factory.mktemp("intact") / "m"
  random_folder(path)
  return path


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
      "architecture is 'retnet9', expected one of .*retnet, tr",
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
def test_damage_is_one_clear_error(intact, tmp_path, damage, message):
  shutil.copytree(intact, tmp_path / "m")
  damage(tmp_path / "m")
  with pytest.raises(ValueError, match=message):
    load(tmp_path / "m")


def test_a_digest_that_is_off_names_its_tensor(intact, tmp_path):
  shutil.copytree(intact, tmp_path / "m")
  edit(tmp_path / "m", lambda d: d["tensors"][QUERY].update(sha256="0" * 64))
  with pytest.raises(ValueError, match=rf"m: tensor {QUERY} is damaged: .*expected 0000"):
    load(tmp_path / "m")


def test_a_folder_of_version_1_gives_its_logits(tmp_path):
  """`data/folder_v1` was written by triform 0.1.0; `make_folder_v1` tells how. Never rewrite it."""
  model, tokenizer = load(DATA / "folder_v1")
  expected = np.load(DATA / "folder_v1.npz")
  np.testing.assert_array_equal(tokenizer.encode("retention"), expected["ids"][0])
  logits, _ = jax.jit(model)(expected["ids"])
  np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def make_folder_v1(path):
  model = random_folder(
    path, d_model=4, num_layers=2, num_heads=2, value_dim=4, ffn_dim=4, tie_embeddings=True,
    decay_schedule="linspace", dropout=0.1,
  )  # fmt: skip
  ids = ByteTokenizer().encode("retention")[None]
  np.savez(f"{path}.npz", ids=ids, logits=np.asarray(model(ids)[0]))
