"""Where a run starts that does not start from random parameters."""

import json

import numpy as np
import pytest
from exported import MODEL, finished_run, leaves_of, random_folder
from flax import nnx
from published import fixture, write_shards
from safetensors.numpy import save_file

from triform.arch import build, load
from triform.arch.export import export
from triform.arch.interop import from_fla, from_torchscale
from triform.arch.layout import split_model, to_stacked
from triform.arch.loading import initial_parameters, load_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return finished_run(tmp_path_factory.mktemp("run"))


def test_initial_parameters_of_runs_and_folders(run, tmp_path):
  export(run, tmp_path / "folder")
  config = load_config(run).model
  expected = leaves_of(build(config, rngs=nnx.Rngs(1)))
  trained = leaves_of(load(run)[0])
  for path in (run, tmp_path / "folder"):
    leaves, tokenizer = initial_parameters(path, config)
    assert tokenizer.fingerprint == "bytes"
    params = {name for name in expected if name.startswith("params/")}
    assert leaves.keys() == params
    for name in params:
      assert isinstance(leaves[name], np.ndarray)
      np.testing.assert_array_equal(leaves[name], trained[name])


def test_initial_parameters_take_the_dtype_of_the_new_run(tmp_path):
  random_folder(tmp_path / "m")
  new = {**MODEL, "param_dtype": "bfloat16", "dropout": 0.5, "scan_layers": False, "key_dim": 8}
  leaves, _ = initial_parameters(tmp_path / "m", new)
  assert {leaf.dtype.name for leaf in leaves.values()} == {"bfloat16"}


def test_initial_parameters_of_another_model_are_refused(tmp_path):
  random_folder(tmp_path / "m")
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


FLA_MODEL = {
  "architecture": "retnet",
  "dialect": "fla",
  "embedding_scale": 1.0,
  "d_model": 32,
  "num_layers": 2,
  "num_heads": 2,
  "value_dim": 64,
}


def test_initial_parameters_of_a_hugging_face_folder(tmp_path):
  config, params = fixture("fla")
  path = write_shards(tmp_path / "m", {"model_type": "retnet", **config}, params)
  sizes = {
    "vocab_size": len(params["lm_head.weight"]),
    "ffn_dim": len(params["model.layers.0.mlp.up_proj.weight"]),
  }
  model = {**FLA_MODEL, **sizes, "scan_layers": True, "dropout": 0.1}
  leaves, tokenizer = initial_parameters(path, model)
  assert tokenizer is None
  expected = split_model(from_fla(config, params, scan_layers=True))[1]
  expected = to_stacked({"params": expected})
  assert leaves.keys() == expected.keys()
  for name, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, expected[name])
  with pytest.raises(ValueError) as caught:
    initial_parameters(path, {**model, "dialect": "torchscale", "embedding_scale": None})
  assert "model.dialect: 'fla', given 'torchscale'" in str(caught.value)
  assert "model.embedding_scale: 1.0, given None" in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "model.npz"])
def test_initial_parameters_of_a_torchscale_checkpoint(tmp_path, file):
  config, params = fixture("torchscale")
  (tmp_path / "config.json").write_text(json.dumps(config))
  if file.endswith("npz"):
    np.savez(tmp_path / file, **params)
  else:
    save_file(params, tmp_path / file)
  model = {
    "architecture": "retnet",
    "vocab_size": len(params["embed_tokens.weight"]),
    "d_model": config["decoder_embed_dim"],
    "num_layers": config["decoder_layers"],
    "num_heads": config["decoder_retention_heads"],
    "value_dim": config["decoder_value_embed_dim"],
    "ffn_dim": config["decoder_ffn_embed_dim"],
    "activation": "silu",
    "eps": config["layernorm_eps"],
  }
  leaves, tokenizer = initial_parameters(tmp_path, model)
  expected = split_model(from_torchscale(config, params, scan_layers=True))[1]
  for name, leaf in to_stacked({"params": expected}).items():
    np.testing.assert_array_equal(leaves[name], leaf)
  assert tokenizer is None
  with pytest.raises(ValueError, match=r"decay_schedule: 'geometric', given 'linspace'"):
    initial_parameters(tmp_path, {**model, "decay_schedule": "linspace"})


def test_what_would_be_unpickled_is_refused(tmp_path):
  config, _ = fixture("torchscale")
  (tmp_path / "config.json").write_text(json.dumps(config))
  np.savez(tmp_path / "model.npz", a=np.array([{}], dtype=object))
  with pytest.raises(ValueError, match=r"model.npz cannot be read: Object arrays cannot be loaded"):
    initial_parameters(tmp_path, FLA_MODEL)
  archive = (tmp_path / "model.npz").read_bytes()
  (tmp_path / "model.npz").write_bytes(archive[:-50])
  with pytest.raises(ValueError, match=r"model.npz cannot be read: "):
    initial_parameters(tmp_path, FLA_MODEL)
  (tmp_path / "model.npz").unlink()
  with pytest.raises(ValueError, match=r"model.npz cannot be read: .*No such file"):
    initial_parameters(tmp_path, FLA_MODEL)
