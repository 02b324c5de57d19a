"""Published checkpoints on disk, and models of ours written as such."""

import io
import json
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from safetensors.numpy import load_file, save_file

from triform.arch import build, tensors
from triform.arch.data.tokenizers import load_tokenizer
from triform.arch.interop import (
  from_fla,
  from_torchscale,
  load_fla,
  save_fla,
  to_fla,
  to_torchscale,
)
from triform.arch.interop.tokenizer import read_tokenizer
from triform.arch.layout import split_model, to_stacked
from triform.arch.loading import initial_parameters

DATA = Path(__file__).parent / "data"
LAYOUTS = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
PLAIN, FUSED = "attn.g_norm.weight", "attn.g_norm_swish_gate.weight"


def fixture(name):
  arrays = dict(np.load(DATA / f"retnet_{name}.npz"))
  params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
  return json.loads(str(arrays["meta"]))["config"], params


@pytest.fixture
def fla():
  config, params = fixture("fla")
  return {"model_type": "retnet", **config}, params


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


# Hugging Face folders of fla


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
  hub.errors = types.SimpleNamespace(HfHubHTTPError=OSError)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  same(load_fla("o/m"), from_fla(*fla))
  with pytest.raises(ValueError, match=r"o/n is no folder here and cannot .* Hub: no network$"):
    load_fla("o/n")


# Back to fla


@LAYOUTS
def test_to_fla_is_the_inverse_of_from_fla(fla, scan_layers):
  config, params = fla
  back, arrays = to_fla(from_fla(config, params, scan_layers=scan_layers))
  assert arrays.keys() == {name.replace(PLAIN, FUSED) for name in params}
  for name, array in params.items():
    got = arrays[name.replace(PLAIN, FUSED)]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
  same(from_fla(back, arrays), from_fla(config, params))
  assert {"model_type": "retnet", "hidden_size": 32, "fuse_norm": True}.items() <= back.items()


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


def test_to_fla_of_other_widths_and_shared_heads():
  for key_dim, value_dim in ((60, 28), (8, 60)):  # int(22 * (60 / 22)) is 59
    widths = {"d_model": 22, "num_kv_heads": 1, "key_dim": key_dim, "value_dim": value_dim}
    model = retnet(**{**FLA, **widths})
    config, params = to_fla(model)
    assert int(22 * config["expand_k"]) == key_dim and int(22 * config["expand_v"]) == value_dim
    same(from_fla(config, params, scan_layers=False), model)


def retnet(**options):
  return build({"architecture": "retnet", "scan_layers": False, **options}, rngs=nnx.Rngs(0))


SMALL = {
  "vocab_size": 20,
  "d_model": 8,
  "num_layers": 1,
  "num_heads": 2,
  "value_dim": 8,
  "ffn_dim": 8,
}
FLA = {**SMALL, "dialect": "fla", "embedding_scale": 1.0}


@pytest.mark.parametrize(
  ("export", "options", "message"),
  [
    (to_fla, SMALL, "dialect is 'torchscale', which cannot be exported; expected 'fla'"),
    (to_fla, {**FLA, "decay": "learned"}, "decay is 'learned', .*expected 'fixed'"),
    (to_fla, {**FLA, "activation": "gelu"}, "activation is 'gelu', .*expected 'silu'"),
    (to_fla, {**FLA, "embedding_scale": 2.0}, "embedding_scale is 2.0, .*expected 1.0"),
    (to_fla, {**FLA, "decay_schedule": "linspace"}, "the decays are not the geometric ones"),
    (to_torchscale, FLA, "dialect is 'fla', which cannot be exported; expected 'torchscale'"),
    (to_torchscale, {**SMALL, "decay": "gated"}, "decay is 'gated', .*expected 'fixed'"),
    (to_torchscale, {**SMALL, "num_kv_heads": 1}, "num_kv_heads is 1, .*expected 2"),
    (to_torchscale, {**SMALL, "key_dim": 4}, "key_dim is 4, .*expected 8"),
    (to_torchscale, {**SMALL, "embedding_scale": 2.0}, "embedding_scale is 2.0, .*expected 1.0 or"),
  ],
)
def test_what_the_other_library_has_not_is_not_exported(export, options, message):
  with pytest.raises(ValueError, match=message):
    export(retnet(**options))


# torchscale


@LAYOUTS
def test_to_torchscale_is_the_inverse_of_from_torchscale(scan_layers):
  config, params = fixture("torchscale")
  model = from_torchscale(config, params, scan_layers=scan_layers)
  back, arrays = to_torchscale(model)
  assert arrays.keys() == params.keys()
  for name, array in params.items():
    assert arrays[name].dtype == np.float32
    if name.endswith("angle"):  # we hold whole fractions of a turn
      np.testing.assert_allclose(arrays[name], array, rtol=0, atol=1e-9)
    else:
      np.testing.assert_array_equal(arrays[name], array, err_msg=name)
  same(from_torchscale(back, arrays, scan_layers=scan_layers), model)
  known = config.keys() & back.keys()
  assert {name: back[name] for name in known} == {name: config[name] for name in known}


def test_to_torchscale_with_a_tied_output():
  model = retnet(**SMALL, tie_embeddings=True, activation="gelu", decay_schedule="linspace")
  config, params = to_torchscale(model)
  assert params["output_projection.weight"] is params["embed_tokens.weight"]
  assert config["share_decoder_input_output_embed"] and config["activation_fn"] == "gelu"
  assert not config["no_scale_embedding"]
  again = from_torchscale(config, params, scan_layers=False)
  ids = np.arange(6)[None]
  np.testing.assert_allclose(again(ids)[0], model(ids)[0], atol=1e-5)


# Where a run starts from


FLA_MODEL = {
  "architecture": "retnet",
  "dialect": "fla",
  "embedding_scale": 1.0,
  "d_model": 32,
  "num_layers": 2,
  "num_heads": 2,
  "value_dim": 64,
}


def test_initial_parameters_of_a_hugging_face_folder(fla, tmp_path):
  config, params = fla
  path = write_shards(tmp_path / "m", config, params)
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


TEXT = "".join(f"value{i % 37} = {i * i}\n" for i in range(300))
LOSSLESS = {
  "normalization_rule_name": "identity",
  "remove_extra_whitespaces": False,
  "byte_fallback": True,
  "vocab_size": 300,
}


def write_tokenizer(folder, **settings):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe",
    minloglevel=2, **{**LOSSLESS, **settings},
  )  # fmt: skip
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_published_tokenizer_keeps_its_ids_and_loses_nothing(tmp_path):
  original = write_tokenizer(tmp_path)
  tokenizer = read_tokenizer(tmp_path, 300)
  assert tokenizer.vocab_size == 300 and tokenizer.bos_id == original.bos_id()
  for text in (TEXT, " value1", "", "a  b\n\tc", "été"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  with_space = "value1 = 1"  # which the original puts before every text
  assert list(tokenizer.encode(f" {with_space}")) == original.encode(with_space)
  tokenizer.save(tmp_path / "saved")
  assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"byte_fallback": False, "vocab_size": 40}, "has no byte fallback: expected a tokenizer that"),
    ({"remove_extra_whitespaces": True}, "tokenizer.model drops spaces: expected"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalises: expected"),
    ({"bos_id": -1}, "has no ids for the ends of a text: expected"),
    ({"vocab_size": 310}, "has 310 ids, the model 300: expected"),
  ],
)
def test_tokenizers_that_lose_text_are_refused(tmp_path, settings, message):
  write_tokenizer(tmp_path, **settings)
  with pytest.raises(ValueError, match=message):
    read_tokenizer(tmp_path, 300)


def test_a_damaged_tokenizer_is_refused(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match=r"tokenizer.model is no sentencepiece model"):
    read_tokenizer(tmp_path, 300)


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
  (tmp_path / "model.npz").unlink()
  with pytest.raises(ValueError, match=r"model.npz cannot be read: .*No such file"):
    initial_parameters(tmp_path, FLA_MODEL)
