"""The Primer importer against numbers that the reference implementations computed.

`data/primer_official.npz`: google-research/primer 3e1a066 on mesh-TensorFlow 0.1.21, random
weights, float32. `data/primer_reference.npz`: a NumPy restatement in float64, with gradients,
packed documents and the state after the last token; its names are translated here.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from published import DATA, LAYOUTS, same

from triform.arch import Primer
from triform.arch.interface import FORMS
from triform.arch.interop import from_primer, to_primer
from triform.arch.layout import split_model, to_stacked

every_form = pytest.mark.parametrize("form", FORMS)
RESTATED = pytest.mark.parametrize("case", ["full", pytest.param("ez", marks=pytest.mark.slow)])
PLACEMENT = {"ez": "pre", "full_intended": "pre_post", "full": "pre_post"}
NORM = "true_layer_norm/layer_prepostprocess/layer_norm/layer_norm"
NAMES = {  # of a block in the restatement, and in mesh-TensorFlow
  "n0/": f"layer_000/{NORM}_",
  "n1/": f"layer_001/{NORM}_",
  "attn/q_solo": "layer_000/MDHA/q_solo_project/kernel",
  "attn/": "layer_000/MDHA/",
  "ffn/wi": "layer_001/DenseReluDense/wi/kernel",
  "ffn/bi": "layer_001/DenseReluDense/wi/bias",
  "ffn/wo": "layer_001/DenseReluDense/wo/kernel",
  "ffn/bo": "layer_001/DenseReluDense/wo/bias",
}


def group(arrays, prefix):
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def official(case):
  arrays = group(dict(np.load(DATA / "primer_official.npz")), f"{case}/")
  meta = json.loads(str(arrays["meta"]))
  config = {
    "vocab_size": meta["V"],
    "d_model": meta["d_model"],
    "d_ff": meta["d_ff"],
    "num_heads": meta["heads"],
    "d_kv": meta["d_kv"],
    "num_layers": meta["layers"],
    "norm_placement": PLACEMENT[case],
  }
  return config, group(arrays, "param/"), arrays


def restated(case):
  arrays = group(dict(np.load(DATA / "primer_reference.npz")), f"{case}/")
  meta = json.loads(str(arrays["meta"]))
  config = {
    "vocab_size": meta["V"],
    "d_model": meta["D"],
    "d_ff": meta["FF"],
    "num_heads": meta["H"],
    "d_kv": meta["D"] // meta["H"],
    "num_layers": meta["L"],
    "norm_placement": PLACEMENT[case],
  }
  return config, translated(group(arrays, "param/")), arrays


def translated(params):
  """The restatement's names as mesh-TensorFlow's."""
  renamed = {}
  for name, array in params.items():
    top, _, rest = name.partition("/")
    if top == "blocks":
      layer, _, rest = rest.partition("/")
      theirs = next(prefix for prefix in NAMES if rest.startswith(prefix))
      new = f"transformer/block_{int(layer):03d}/{NAMES[theirs]}{rest.removeprefix(theirs)}"
    else:
      new = {
        "emb": "transformer/embedding",
        "rel": "transformer/block_000/layer_000/MDHA/relative_attention_bias",
        "nf": f"transformer/{NORM}_{rest}",
      }[top]
    if new.endswith("_dconv"):
      renamed |= {f"{new}/conv_{i}": tap for i, tap in enumerate(array)}
    else:
      renamed[new] = array
  return renamed


def error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def call(model, ids, **arguments):
  return jax.jit(lambda ids: model(ids, **arguments))(ids)


@every_form
@pytest.mark.parametrize("case", ["ez", "full_intended"])
def test_official_logits(case, form):
  config, params, arrays = official(case)
  ids, expected = arrays["in/ids"], arrays["logits"]
  model = from_primer(config, params, chunk_size=4)
  logits, _ = call(model, ids, form=form)
  assert logits.shape == expected.shape and error(logits, expected) <= 1e-5
  start, state = call(model, ids[:, :5], form=form)
  rest, _ = call(model, ids[:, 5:], state=state, form="recurrent")
  assert error(np.concatenate([start, rest], axis=1), expected) <= 1e-5


@every_form
@RESTATED
def test_restated_logits_state_and_packing(case, form):
  config, params, arrays = restated(case)
  ids = arrays["in/ids"].astype(np.int32)
  for x64, tolerance in ((False, 1e-5), (True, 1e-12)):
    with jax.enable_x64(x64):
      model = from_primer(config, params, chunk_size=4, max_len=17, scan_layers=False)
      logits, state = call(model, ids, form=form)
      assert error(logits, arrays["logits"]) <= tolerance
      b = len(ids)
      for name, ours in (("k", state[0].cache.k), ("v", state[0].cache.v)):
        expected = arrays[f"final_state_layer0/{name}"]
        assert error(ours.reshape(b, 17, -1), expected) <= tolerance
      for name, theirs in (("query", "tq"), ("key", "tk"), ("value", "tv")):
        if name in state[0].tails:
          expected = arrays[f"final_state_layer0/{theirs}"]
          assert error(state[0].tails[name], expected) <= tolerance
      packed, _ = call(model, ids, form=form, reset=arrays["packed/seg_pos"] == 0)
      assert error(packed, arrays["packed/logits"]) <= tolerance


@every_form
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
@RESTATED
def test_restated_gradients(case, scan_layers, form):
  """Of `sum(logits * cot)`, by every parameter, the shared table of relative positions included."""
  config, params, arrays = restated(case)
  with jax.enable_x64():
    model = from_primer(config, params, chunk_size=4, scan_layers=scan_layers)
    expected = from_primer(config, translated(group(arrays, "grad_param/")), scan_layers=True)
    graphdef, values, rest = split_model(model)

    def loss(values):
      logits, _ = nnx.merge(graphdef, values, rest)(arrays["in/ids"].astype(np.int32), form=form)
      return (logits * arrays["cot"]).sum()

    got = to_stacked(jax.jit(jax.grad(loss))(values))
    for name, leaf in to_stacked(split_model(expected)[1]).items():
      assert error(got[name], leaf) <= 1e-10, name


@pytest.mark.parametrize("case", ["ez", "full_intended"])
@LAYOUTS
def test_to_primer_is_the_inverse(case, scan_layers):
  config, params, _ = official(case)
  back, arrays = to_primer(from_primer(config, params, scan_layers=scan_layers))
  assert arrays.keys() == params.keys()
  for name, array in params.items():
    np.testing.assert_array_equal(arrays[name], array, err_msg=name)
  same(from_primer(back, arrays), from_primer(config, params))


def test_a_model_that_scales_its_table_is_exported_as_one_that_does_not():
  sizes = {"vocab_size": 8, "d_model": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 8}
  model = Primer(**sizes, scan_layers=False, rngs=nnx.Rngs(0))
  back = from_primer(*to_primer(model), scan_layers=False)
  assert (model.embedding_scale, back.embedding_scale) == (8**0.5, 1.0)
  ids = np.arange(8, dtype=np.int32)[None]
  assert error(call(back, ids)[0], call(model, ids)[0]) <= 1e-5


def plain(params):
  """Without convolutions, as the published Transformer."""
  return {
    name.replace("/MDHA/", "/SelfAttention/"): array
    for name, array in params.items()
    if "_dconv/" not in name
  }


def test_plain_attention_is_read_off_the_names():
  config, params, arrays = official("ez")
  model = from_primer(config, plain(params), scan_layers=False)
  identity = {
    name: np.full_like(array, name.endswith("conv_0")) if "_dconv/" in name else array
    for name, array in params.items()
  }
  expected, _ = call(from_primer(config, identity), arrays["in/ids"])
  assert error(call(model, arrays["in/ids"])[0], expected) <= 1e-5
  _, back = to_primer(model)
  assert back.keys() == plain(params).keys()


def test_what_belongs_to_the_optimizer_is_left_alone():
  config, params, _ = official("ez")
  more = {"global_step": np.int64(3), "transformer/embedding_slot_vr": np.zeros(16)}
  same(from_primer(config, params | more), from_primer(config, params))


BLOCK = "transformer/block_001/layer_000/MDHA"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c, p: p.pop(f"{BLOCK}/q"), f"missing: {BLOCK}/q"),
    (lambda c, p: p.pop(f"{BLOCK}/v_dconv/conv_1"), f"missing: {BLOCK}/v_dconv/conv_1"),
    (lambda c, p: p.update({"transformer/extra": np.zeros(2)}), "not expected: transformer/extra"),
    (lambda c, p: c.update(num_heads=2), r"MDHA/k has shape \[16, 16\], expected \[16, 8\]"),
    (lambda c, p: c.update(norm_placement="post"), "norm_placement is 'post', which is not"),
    (lambda c, p: c.pop("d_kv"), "the config lacks d_kv"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  config, params, _ = official("ez")
  change(config, params)
  with pytest.raises(ValueError, match=message):
    from_primer(config, params)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"position": "rotary"}, "position is 'rotary'"),
    ({"window": 4}, "window is 4, which cannot be converted; expected None"),
    ({"activation": "gelu"}, "activation is 'gelu'"),
    ({"norm": "rms"}, "norm is 'RMSNorm'"),
    ({"num_kv_heads": 1}, "num_kv_heads is 1"),
    ({"tie_embeddings": False}, "tie_embeddings is False"),
    ({"tanh": True}, "tanh is True"),
    ({"conv_scale": -1.12}, "conv_scale is -1.12"),
    ({"input_floor": -0.57}, "input_floor is -0.57"),
    ({"output_bias": False}, "output_bias is False"),
  ],
)
def test_what_the_published_code_has_not_is_refused(options, message):
  sizes = {"vocab_size": 8, "d_model": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 8}
  with pytest.raises(ValueError, match=message):
    to_primer(Primer(**sizes, scan_layers=False, **options, rngs=nnx.Rngs(0)))
