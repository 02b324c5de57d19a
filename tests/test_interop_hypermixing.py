"""The HyperMixing importers against numbers of the published layers.

`data/hypermixing.npz`: idiap/hypermixing d35415c and SpeechBrain 9c826ef, float64 with gradients;
`*_prefix*` is the idiap layer run on every prefix, its last output kept.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from triform.arch import CausalHyperMixing, HyperMixing
from triform.arch.interface import FORMS
from triform.arch.interop import from_idiap, from_speechbrain, to_idiap, to_speechbrain
from triform.arch.layout import split_model, to_stacked

ARRAYS = dict(np.load(Path(__file__).parent / "data/hypermixing.npz"))
CASES = [name.removesuffix("/out") for name in ARRAYS if name.endswith("/out")]
IDIAP = [name for name in CASES if name.startswith("idiap") and "prefix" not in name]
PREFIX = [name for name in CASES if "prefix" in name]
QUICK = {
  "idiap_h2_untied_bias", "idiap_h4_tied_patched", "idiap_h4_untied_masked", "idiap_h2_cross",
  "idiap_h4_prefix", "sb_h4_untied_fixtm",
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)

TRUTH = {"True": True, "False": False}


def parameters(cases):
  return [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in cases]


def group(case, prefix):
  prefix = f"{case}/{prefix}"
  return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


def published(case):
  """The official constructor's arguments, and the parameters."""
  meta, params = json.loads(str(ARRAYS[f"{case}/meta"])), group(case, "param/")
  config = {"input_output_dim": ARRAYS[f"{case}/out"].shape[-1], "hypernet_size": meta["K"]}
  config["num_heads"] = int(meta["num_heads"])
  for name in ("tied", "hypernetwork_bias", "use_layer_norm", "fix_tm_hidden_size"):
    if name in meta:
      config[name] = TRUTH[meta[name]]
  if "token_information" in meta:
    config["token_information"] = "none"
  table = [params[name] for name in params if name.endswith(".pe")]
  if table:
    config["max_length"] = table[0].shape[1]
  if "prefix" in case:
    config["causal"] = True
  return config, params


def layer_of(case, **options):
  config, params = published(case)
  return (from_speechbrain if case.startswith("sb") else from_idiap)(config, params, **options)


def inputs(case):
  """Positional arrays, and how the published layer's padding masks are ours."""
  arrays = group(case, "in/")
  masks = {}
  if "key_padding_mask" in arrays:
    masks["mask"] = ~arrays["key_padding_mask"]
  if "query" in arrays:
    return (arrays["query"], arrays["key"], arrays["value"]), masks
  return (arrays["x"],), masks


def call(layer, arrays, masks, form):
  x, *memory = arrays
  return layer(x, form=form, **masks, **({"memory": tuple(memory)} if memory else {}))[0]


def error(got, expected):
  got, expected = np.asarray(got), np.asarray(expected)
  return np.abs(got - expected).max() / np.abs(expected).max()


# SpeechBrain computes its table in float32, a product of a position and a rounded frequency.
def tolerance(case):
  return 1e-6 if case.startswith("sb") else 1e-12


@every_form
@pytest.mark.parametrize("case", parameters(CASES))
def test_published_outputs(case, form):
  arrays, masks = inputs(case)
  expected = ARRAYS[f"{case}/out"]
  layer = layer_of(case, chunk_size=4)
  assert isinstance(layer, CausalHyperMixing if case in PREFIX else HyperMixing)
  y = call(layer, [a.astype(np.float32) for a in arrays], masks, form)
  assert y.dtype == jnp.float32 and error(y, expected) <= 1e-5
  with jax.enable_x64():
    y = call(layer_of(case, chunk_size=4), arrays, masks, form)
    assert y.dtype == jnp.float64 and error(y, expected) <= tolerance(case)


@every_form
@pytest.mark.parametrize("case", parameters(case for case in CASES if case not in PREFIX))
def test_published_gradients(case, form):
  """Of `sum(out * cot)`, by every parameter and input."""
  arrays, masks = inputs(case)
  with jax.enable_x64():
    graphdef, params, rest = split_model(layer_of(case, chunk_size=4))

    def loss(params, arrays):
      y = call(nnx.merge(graphdef, params, rest), arrays, masks, form)
      return (y * ARRAYS[f"{case}/cot"]).sum()

    by_params, by_inputs = jax.jit(jax.grad(loss, (0, 1)))(params, [*map(jnp.asarray, arrays)])
    config, weights = published(case)
    tables = {name: array for name, array in weights.items() if name.endswith(".pe")}
    gradients = group(case, "grad_param/") | tables
    if config.get("tied"):  # the file has the sum over both uses under the first name alone
      gradients |= {n.replace("w1", "w2"): a for n, a in gradients.items() if ".w1" in n}
    read = from_speechbrain if case.startswith("sb") else from_idiap
    expected = to_stacked(split_model(read(config, gradients))[1])
  got = to_stacked(by_params)
  assert got.keys() == expected.keys()
  for name, leaf in expected.items():
    assert error(got[name], leaf) <= 100 * tolerance(case), name
  for ours, theirs in zip(by_inputs, group(case, "grad_in/").values(), strict=True):
    assert error(ours, theirs) <= 100 * tolerance(case)


@pytest.mark.parametrize("case", parameters(PREFIX))
def test_a_causal_layer_goes_on_from_its_state(case):
  (x,), _ = inputs(case)
  with jax.enable_x64():
    layer, state, pieces = layer_of(case), None, []
    for start, stop, form in ((0, 4, "chunkwise"), (4, 5, "recurrent"), (5, 11, "parallel")):
      y, state = layer(x[:, start:stop], state, form=form)
      pieces.append(y)
    assert error(np.concatenate(pieces, axis=1), ARRAYS[f"{case}/out"]) <= 1e-12


@pytest.mark.parametrize("case", IDIAP)
def test_to_idiap_is_the_inverse(case):
  config, params = published(case)
  with jax.enable_x64():
    told, back = to_idiap(from_idiap(config, params), max_length=config.get("max_length", 64))
  assert {**told, **config} == told
  assert back.keys() == params.keys()
  for name, array in params.items():
    if name.endswith(".pe"):  # in float32, by sines of 32-bit phases
      np.testing.assert_allclose(back[name], array, atol=5e-7)
    else:
      np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize("case", ["sb_h4_tied", "sb_h4_untied_fixtm"])
def test_to_speechbrain_is_the_inverse(case):
  config, params = published(case)
  config["hypernet_size"] *= config["num_heads"] if config.pop("fix_tm_hidden_size", False) else 1
  told, back = to_speechbrain(layer_of(case), max_length=64)
  assert {**told, **config} == told
  for name, array in params.items():
    np.testing.assert_allclose(back[name], array, atol=2e-6, err_msg=name)
  again = from_speechbrain(told, back)
  x = inputs(case)[0][0].astype(np.float32)
  np.testing.assert_array_equal(again(x)[0], layer_of(case)(x)[0])


WEIGHTS = "hyper.w1_gen.fc2_weights"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c, p: p.pop(WEIGHTS), f"missing: {WEIGHTS}"),
    (lambda c, p: p.update(extra=np.zeros(2)), "not expected: extra"),
    (
      lambda c, p: c.update(hypernet_size=28),
      r"fc2_weights has shape \[4, 6, 4\], expected \[4, 7",
    ),
    (lambda c, p: c.pop("hypernet_size"), "the config lacks hypernet_size"),
    (lambda c, p: c.update(token_information="learned"), "token_information is 'learned'"),
    (lambda c, p: c.update(tied=True), r"the layer is tied, but hyper.w2_gen.* is not as in"),
    (lambda c, p: c.update(max_length=65), r"pe has shape \[1, 64, 16\], expected \[1, 65, 16\]"),
    (lambda c, p: p.pop("token_information.pe"), "missing: token_information.pe"),
    (
      lambda c, p: p.update({"token_information.pe": np.zeros((1, 64, 16))}),
      "token_information.pe is off the official table by 1",
    ),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  config, params = published("idiap_h4_untied")
  change(config, params)
  with pytest.raises(ValueError, match=message):
    from_idiap(config, params)


@pytest.mark.parametrize(
  ("convert", "options", "message"),
  [
    (to_idiap, {"position": "standard"}, "position is 'standard', which cannot be converted"),
    (to_idiap, {"activation": "relu"}, "activation is 'relu'"),
    (to_idiap, {"eps": 1e-6}, "eps is 1e-06"),
    (to_speechbrain, {}, "use_bias is False, which cannot be converted; expected True"),
    (to_speechbrain, {"use_bias": True, "position": "none"}, "position is 'none'"),
  ],
)
def test_what_the_published_code_has_not_is_refused(convert, options, message):
  layer = HyperMixing(8, num_heads=2, mixing_dim=8, **options, rngs=nnx.Rngs(0))
  if convert is to_idiap and "position" not in options:
    layer.position = "official"
  with pytest.raises(ValueError, match=message):
    convert(layer)
  causal = CausalHyperMixing(8, num_heads=2, mixing_dim=8, position="none", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="layer is a CausalHyperMixing, expected HyperMixing"):
    to_idiap(causal)
