"""What tests of published checkpoints share."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from triform.arch.layout import split_model, to_stacked

PLAIN, FUSED = "attn.g_norm.weight", "attn.g_norm_swish_gate.weight"
DATA = Path(__file__).parent / "data"
LAYOUTS = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])


def fixture(name):
  arrays = dict(np.load(DATA / f"retnet_{name}.npz"))
  params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
  return json.loads(str(arrays["meta"]))["config"], params


def write(folder, config, params):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(params, folder / "model.safetensors", metadata={"format": "pt"})
  return folder


def write_shards(folder, config, params):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  names = sorted(params)
  files = {
    "model-00001-of-00002.safetensors": names[::2],
    "model-00002-of-00002.safetensors": names[1::2],
  }
  for file, held in files.items():
    save_file({name: params[name] for name in held}, folder / file)
  placed = {name: file for file, held in files.items() for name in held}
  index = {"metadata": {"total_size": 0}, "weight_map": placed}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def same(a, b):
  leaves = [to_stacked(list(split_model(m)[1:])) for m in (a, b)]
  assert leaves[0].keys() == leaves[1].keys()
  for name, leaf in leaves[0].items():
    np.testing.assert_array_equal(leaf, leaves[1][name], err_msg=name)
