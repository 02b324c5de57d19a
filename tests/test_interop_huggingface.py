"""Hugging Face folders of flash-linear-attention, read and written."""

import json
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from published import FUSED, LAYOUTS, PLAIN, fixture, same, write, write_shards
from safetensors.numpy import load_file

from triform.arch import tensors
from triform.arch.interop import (
  from_fla,
  load_fla,
  save_fla,
)


@pytest.fixture
def fla():
  config, params = fixture("fla")
  return {"model_type": "retnet", **config}, params


@LAYOUTS
@pytest.mark.parametrize("writer", [write, write_shards])
def test_load_fla(fla, tmp_path, writer, scan_layers):
  path = writer(tmp_path / "m", *fla)
  same(load_fla(path, scan_layers=scan_layers), from_fla(*fla, scan_layers=scan_layers))


def test_load_fla_of_the_fused_layout(fla, tmp_path):
  config, params = fla
  legacy = {name.replace(PLAIN, FUSED): array for name, array in params.items()}
  for i in range(2):
    mlp = f"model.layers.{i}.mlp."
    both = (legacy[f"{mlp}gate_proj.weight"], legacy.pop(f"{mlp}up_proj.weight"))
    legacy[f"{mlp}gate_proj.weight"] = np.concatenate(both)
  for writer in (write, write_shards):
    same(load_fla(writer(tmp_path / writer.__name__, config, legacy)), from_fla(*fla))


def test_load_fla_in_bfloat16(fla, tmp_path):
  config, params = fla
  half = {name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()}
  path = write(tmp_path / "m", config, half)
  model = load_fla(path)
  assert model.embedding.embedding[...].dtype == "float32"
  same(model, from_fla(config, half))
  kept = load_fla(path, param_dtype="bfloat16")
  np.testing.assert_array_equal(kept.head.kernel[...], half["lm_head.weight"].T)
  assert kept.head.kernel[...].dtype == "bfloat16"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"use_short_conv": True}, "use_short_conv is True, which is not supported; expected False"),
    ({"attn": {"layers": [1]}}, r"attn is \{'layers': \[1\]\}, which is not supported"),
    ({"model_type": "gla"}, "config.json has model_type 'gla', expected 'retnet'"),
    ({"num_hidden_layers": 3}, r"missing: model.layers.2.attn.g_norm"),
    ({"hidden_size": 64}, r"lm_head.weight has shape \[\d+, 32\], expected \[\d+, 64\]"),
  ],
)
def test_load_fla_refuses(fla, tmp_path, change, message):
  config, params = fla
  path = write(tmp_path / "m", config | change, params)
  with pytest.raises(ValueError, match=message):
    load_fla(path)


def edit_index(folder, change):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda p: (p / SECOND).unlink(), f"{SECOND} cannot be read as safetensors: No such file"),
    (
      lambda p: (p / SECOND).write_bytes((p / SECOND).read_bytes()[:-9]),
      f"{SECOND} cannot be read",
    ),
    (lambda p: (p / SECOND).write_bytes(b"\x80\x04."), f"{SECOND} cannot be read"),
    (
      lambda p: edit_index(p, lambda m: m.update({"lm_head.weight": SECOND})),
      f"{SECOND} does not hold lm_head.weight",
    ),
    (
      lambda p: edit_index(p, lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
      r"names '../x.safetensors', expected a file in the same folder",
    ),
    (
      lambda p: (p / SECOND).write_bytes((p / SECOND.replace("2-", "1-", 1)).read_bytes()),
      f"{SECOND} holds again",
    ),
    (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "is no index of safetensors"),
    (lambda p: (p / "config.json").unlink(), "config.json cannot be read"),
    (lambda p: (p / "config.json").write_text("no"), "config.json cannot be read"),
    (lambda p: (p / "config.json").write_text("[]"), r"config.json is \[\], expected an object"),
    (
      lambda p: (p / "model.safetensors.index.json").rename(p / "pytorch_model.bin"),
      "has neither model.safetensors nor .*: only safetensors are read",
    ),
  ],
)
def test_damaged_hugging_face_folders(fla, tmp_path, damage, message):
  path = write_shards(tmp_path / "m", *fla)
  damage(path)
  with pytest.raises(ValueError, match=message):
    load_fla(path)


def test_hub_repositories(fla, tmp_path, monkeypatch):
  with pytest.raises(
    ValueError, match=r"nowhere not found: expected a folder, or a Hub repository"
  ):
    load_fla("nowhere")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
  with pytest.raises(ValueError, match=r"o/m is no folder here; to read it .*'triform\[hub\]'"):
    load_fla("o/m")

  folder = write(tmp_path / "m", *fla)

  def download(name, allow_patterns):
    assert "config.json" in allow_patterns and "*.safetensors" in allow_patterns
    if name != "o/m":
      raise OSError("no network\nat all")
    return str(folder)

  hub = types.ModuleType("huggingface_hub")
  hub.snapshot_download = download
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  same(load_fla("o/m"), from_fla(*fla))
  with pytest.raises(ValueError, match=r"o/n is no folder here and cannot .* Hub: no network$"):
    load_fla("o/n")


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_save_fla(fla, tmp_path, monkeypatch, shard_bytes):
  monkeypatch.setattr(tensors, "SHARD_BYTES", shard_bytes)
  model = from_fla(*fla, param_dtype="bfloat16")
  save_fla(model, tmp_path / "m")
  files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
  assert ("model.safetensors" in files) == (shard_bytes == 10**9)
  held = load_file(tmp_path / "m" / files[0])
  assert {array.dtype.name for array in held.values()} == {"bfloat16"}
  config = json.loads((tmp_path / "m" / "config.json").read_text())
  assert config["torch_dtype"] == "bfloat16"
  same(load_fla(tmp_path / "m", param_dtype="bfloat16"), model)
  with pytest.raises(ValueError, match=r"m exists, expected a new or empty folder"):
    save_fla(model, tmp_path / "m")
