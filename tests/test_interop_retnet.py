"""RetNet importers against numbers that the reference implementations computed.

`data/retnet_torchscale.npz`: torchscale 4d1e0e8 on CPU, random weights, its recurrent form, its
decoding cache after the last token, and the gradients of the mean next-token cross entropy.
`data/retnet_fla.npz`: fla bc3b101, random weights, its own kernels interpreted on CPU.
Each names its configuration in `meta`, and its parameters as the source's state dict does.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from published import DATA, LAYOUTS

from triform.arch.interface import FORMS, Scanned
from triform.arch.interop import (
  from_fla,
  from_torchscale,
  state_from_torchscale,
  state_to_torchscale,
)
from triform.arch.layout import split_model
from triform.kernels.retention import reference


def load(name):
  arrays = dict(np.load(DATA / f"{name}.npz"))
  return json.loads(str(arrays["meta"]))["config"], arrays


def group(arrays, prefix):
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def torchscale():
  config, arrays = load("retnet_torchscale")
  return config, group(arrays, "param/"), arrays


@pytest.fixture(scope="module")
def fla():
  config, arrays = load("retnet_fla")
  return config, group(arrays, "param/"), arrays


def run(model, ids, **arguments):
  return jax.jit(lambda ids: model(ids, **arguments))(ids)


# torchscale


@LAYOUTS
@pytest.mark.parametrize("form", FORMS)
def test_torchscale(torchscale, form, scan_layers):
  config, params, arrays = torchscale
  options = {"scan_layers": scan_layers, "chunk_size": 8}
  model = from_torchscale(config, params, **options)
  graphdef, weights, rest = split_model(model)
  ids = arrays["input_ids"]

  def loss(weights):
    logits, state = nnx.merge(graphdef, weights, rest)(ids, form=form)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean(), (logits, state)

  (_, (logits, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
  assert error(logits, arrays["logits_recurrent"]) < 1e-5

  cache, length = state_to_torchscale(model, state)
  assert length == ids.shape[1]
  for i in range(2):
    for name in ("prev_key_value", "scale"):
      assert error(cache[i][name], arrays[f"state/{i}/{name}"]) < 1e-5
  # Parameters move and permute, so gradients imported as parameters are in the model's places.
  expected = split_model(from_torchscale(config, group(arrays, "grad/"), **options))[1]
  assert max(jax.tree.leaves(jax.tree.map(error, gradients, expected))) < 1e-4


@LAYOUTS
def test_torchscale_state_continues(torchscale, scan_layers):
  config, params, arrays = torchscale
  model = from_torchscale(config, params, scan_layers=scan_layers)
  ids = arrays["input_ids"]
  cache = {i: group(arrays, f"state/{i}/") for i in range(2)}
  _, state = run(model, ids)
  imported = state_from_torchscale(model, cache, ids.shape[1])
  assert isinstance(imported, Scanned) == scan_layers
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), imported, state)
  back, _ = state_to_torchscale(model, imported)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, cache)


def test_torchscale_state_without_a_scale(torchscale):
  config, params, _ = torchscale
  model = from_torchscale(config, params)
  with pytest.raises(ValueError, match=r"positions are \[0 0\], expected the same in all rows"):
    state_to_torchscale(model, model.init_state(2))


def test_torchscale_decays_and_angles_are_checked(torchscale):
  config, params, _ = torchscale
  heads = config["decoder_retention_heads"]
  paper = np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads)))

  def schedule(params):
    return from_torchscale(config, params, scan_layers=True).stack.layers.mixer.decay_schedule

  assert schedule(params) == "geometric"
  assert schedule({k: v for k, v in params.items() if "retnet_rel_pos" not in k}) == "geometric"
  for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
    assert schedule(params | {"retnet_rel_pos.decay": paper.astype(dtype)}) == "linspace"
  for decay in (np.full(heads, -0.1), np.append(paper, -0.1)):
    with pytest.raises(
      ValueError, match=r"retnet_rel_pos.decay is \[-.*\], which is not supported"
    ):
      schedule(params | {"retnet_rel_pos.decay": decay})
  angle = params["retnet_rel_pos.angle"]
  for wrong in (angle * np.float32(1.001), angle[:2], np.arange(8.0)):
    with pytest.raises(ValueError, match=r"expected the 8 that torchscale computes"):
      schedule(params | {"retnet_rel_pos.angle": wrong})


def test_torchscale_prefix_tied_output_and_vocabulary(torchscale):
  config, params, _ = torchscale
  embedding = params["embed_tokens.weight"]
  ids = np.arange(12).reshape(2, 6)
  untied = from_torchscale(config, params | {"output_projection.weight": embedding})
  config = config | {"share_decoder_input_output_embed": True, "vocab_size": -1}
  shared = {f"decoder.{k}": v for k, v in params.items() if k != "output_projection.weight"}
  tied = from_torchscale(config, shared)
  assert tied.head is None
  assert error(run(tied, ids)[0], run(untied, ids)[0]) < 1e-6
  twice = shared | {"decoder.output_projection.weight": embedding}
  assert from_torchscale(config, twice).head is None
  with pytest.raises(ValueError, match=r"tied, but output_projection.weight and embed_tokens"):
    from_torchscale(config, params)
  with pytest.raises(ValueError, match=r"vocab_size is -1, and embed_tokens.weight is missing"):
    from_torchscale(config, {})


def test_torchscale_defaults(torchscale):
  config, params, _ = torchscale
  assert from_torchscale(config, params).embedding_scale == 32**0.5
  for name in ("no_scale_embedding", "activation_fn", "layernorm_eps"):
    config = {k: v for k, v in config.items() if k != name}
  model = from_torchscale(config, params, scan_layers=True, dtype="bfloat16")
  assert model.embedding_scale == 1.0
  assert model.stack.layers.feed_forward.activation == "gelu"
  assert model.stack.layers.mixer.eps == 1e-6
  assert model.stack.layers.mixer.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("decoder_normalize_before", False),
    ("deepnorm", True),
    ("layernorm_embedding", True),
    ("moe_freq", 2),
    ("multiway", True),
    ("no_output_layer", True),
    ("activation_fn", "tanh"),
  ],
)
def test_torchscale_refuses_options(torchscale, option, value):
  config, params, _ = torchscale
  with pytest.raises(ValueError, match=f"{option} is {value!r}, .*expected"):
    from_torchscale(config | {option: value}, params)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("layers.1.moe_layer.gate.wg.weight", "mixture-of-experts"),
    ("layernorm_embedding.weight", "a norm after the embedding"),
    ("layers.0.ffn.fc1.bias", "before October 2023"),
    ("layers.0.retention.group_norm.weight", "not expected: layers.0.retention.group_norm.weight"),
  ],
)
def test_torchscale_refuses_layouts(torchscale, name, message):
  config, params, _ = torchscale
  with pytest.raises(ValueError, match=message) as caught:
    from_torchscale(config, params | {name: np.zeros(3, np.float32)})
  assert name in str(caught.value)


def test_parameters_are_used_exactly_once(torchscale):
  config, params, _ = torchscale
  wrong = dict(params)
  del wrong["layers.1.ffn.gate.weight"]
  wrong["version"] = np.zeros(1)
  wrong["layers.0.ffn.fc2.weight"] = np.zeros((48, 32))
  with pytest.raises(ValueError) as caught:
    from_torchscale(config, wrong)
  assert str(caught.value) == (
    "parameters do not fit the torchscale config; missing: layers.1.ffn.gate.weight; "
    "not expected: version; layers.0.ffn.fc2.weight has shape [48, 32], expected [32, 48]"
  )
  with pytest.raises(ValueError, match=r"missing: layers.10.ffn.fc1.weight, .* and 88 more$"):
    from_torchscale(config | {"decoder_layers": 12}, params)


def test_dtypes(torchscale):
  config, params, _ = torchscale

  def dtypes(model):
    return {leaf.dtype.name for leaf in jax.tree.leaves(split_model(model)[1:])} - {"uint32"}

  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}
  wide = {k: v.astype(np.float64) for k, v in params.items()}
  assert dtypes(from_torchscale(config, half)) == {"float32"}
  assert dtypes(from_torchscale(config, wide)) == {"float32"}
  with jax.enable_x64(True):
    assert dtypes(from_torchscale(config, params)) == {"float32"}
    assert dtypes(from_torchscale(config, wide)) == {"float64"}


def test_the_model_does_not_share_memory_with_the_checkpoint(torchscale):
  config, params, _ = torchscale
  params = {k: v.copy() for k, v in params.items()}
  model = from_torchscale(config, params)
  before = np.array(model.embedding.embedding[...])
  params["embed_tokens.weight"][:] = 0
  np.testing.assert_array_equal(model.embedding.embedding[...], before)


# flash-linear-attention


@LAYOUTS
@pytest.mark.parametrize("form", FORMS)
def test_fla(fla, form, scan_layers):
  config, params, arrays = fla
  model = from_fla(config, params, scan_layers=scan_layers, chunk_size=16)
  assert error(run(model, arrays["input_ids"], form=form)[0], arrays["logits"]) < 1e-5
  ids = arrays["input_ids_80"]
  assert error(run(model, ids, form=form)[0], arrays["logits_80_chunk"]) < 1e-5


@LAYOUTS
def test_fla_prefill_then_steps(fla, scan_layers):
  config, params, arrays = fla
  model = from_fla(config, params, scan_layers=scan_layers)
  ids = arrays["input_ids_80"]
  step = jax.jit(lambda ids, state: model(ids, state, form="recurrent"))
  logits, state = run(model, ids[:, :70], form="chunkwise")
  pieces = [logits]
  for n in range(70, 80):
    logits, state = step(ids[:, n : n + 1], state)
    pieces.append(logits)
  assert error(jnp.concatenate(pieces, axis=1), arrays["logits_80_prefill70_step"]) < 1e-5


def fla_logits(params, ids, *, heads, kv_heads, eps=1e-6):
  """fla's RetNet restated in float64 NumPy."""
  params = {name: np.asarray(array, np.float64) for name, array in params.items()}
  b, t = ids.shape

  def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight

  def silu(x):
    return x / (1 + np.exp(-x))

  def rotate(x, size):
    turn = np.exp(1j * np.outer(np.arange(t), 10000.0 ** (-2 * np.arange(size // 2) / size)))
    first, second = np.split(x.reshape(b, t, -1, size), 2, axis=-1)
    z = (first + 1j * second) * turn[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)

  x = params["model.embeddings.weight"][ids]
  for i in range(2):
    w = group(params, f"model.layers.{i}.")
    y = rms_norm(x, w["attn_norm.weight"])
    q, k, v, g = (y @ w[f"attn.{name}_proj.weight"].T for name in "qkvg")
    size = q.shape[-1] // heads
    o, _ = reference.retention(
      rotate(q, size),
      rotate(k, size) * size**-0.5,
      v.reshape(b, t, kv_heads, -1),
      np.log(1 - 2.0 ** (-5 - np.arange(heads))),
    )
    o = rms_norm(o, w["attn.g_norm.weight"]).reshape(b, t, -1)
    x = x + (silu(g) * o) @ w["attn.o_proj.weight"].T
    y = rms_norm(x, w["mlp_norm.weight"])
    hidden = silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    x = x + hidden @ w["mlp.down_proj.weight"].T
  return rms_norm(x, params["model.norm.weight"]) @ params["lm_head.weight"].T


def test_fla_restatement(fla):
  _, params, arrays = fla
  logits = fla_logits(params, arrays["input_ids"], heads=2, kv_heads=2)
  assert error(logits, arrays["logits"]) < 1e-5


@pytest.mark.parametrize(("expand_k", "expand_v"), [(1.0, 2.0), (0.5, 1.5)])
def test_fla_shared_heads_and_widths_in_float64(fla, expand_k, expand_v):
  config, params, arrays = fla
  rng = np.random.default_rng(0)
  heads, kv_heads = 4, 2
  config = config | {"num_heads": 4, "num_kv_heads": 2, "expand_k": expand_k, "expand_v": expand_v}
  key, value = int(32 * expand_k), int(32 * expand_v)
  shapes = {
    "q_proj": (key, 32),
    "k_proj": (key // 2, 32),
    "v_proj": (value // 2, 32),
    "g_proj": (value, 32),
    "o_proj": (32, value),
    "g_norm": (value // heads,),
  }
  params = {name: array.astype(np.float64) for name, array in params.items()}
  for i in range(2):
    for name, shape in shapes.items():
      params[f"model.layers.{i}.attn.{name}.weight"] = rng.normal(size=shape) / 5
  expected = fla_logits(params, arrays["input_ids"], heads=heads, kv_heads=kv_heads)
  with jax.enable_x64(True):
    logits, _ = run(from_fla(config, params), arrays["input_ids"], form="chunkwise")
    assert logits.dtype == jnp.float64
    assert error(logits, expected) < 1e-6  # angles are 32-bit fractions of a turn


def test_fla_layouts(fla):
  config, params, _ = fla
  expected = split_model(from_fla(config, params))[1]
  legacy = dict(params)
  for i in range(2):
    mlp = f"model.layers.{i}.mlp."
    both = legacy[f"{mlp}gate_proj.weight"], legacy.pop(f"{mlp}up_proj.weight")
    legacy[f"{mlp}gate_proj.weight"] = np.concatenate(both)
    attn = f"model.layers.{i}.attn."
    legacy[f"{attn}g_norm_swish_gate.weight"] = legacy.pop(f"{attn}g_norm.weight")
  got = split_model(from_fla(config, legacy))[1]
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_fla_tied_output(fla):
  config, params, _ = fla
  config = config | {"tie_word_embeddings": True}
  with pytest.raises(ValueError, match=r"lm_head.weight and model.embeddings.weight differ"):
    from_fla(config, params)
  params = {k: v for k, v in params.items() if k != "lm_head.weight"}
  assert from_fla(config, params).head is None


@pytest.mark.parametrize(("ratio", "width"), [(2, 512), (4, 768), (None, 768)])
def test_fla_default_ffn_width(ratio, width):
  # 2/3 of ratio * 256, in whole 256s.
  expected = rf"gate_proj.weight has shape \[1, 1\], expected \[{width}, 256\]"
  with pytest.raises(ValueError, match=expected):
    from_fla(
      {"hidden_size": 256, "num_hidden_layers": 1, "hidden_ratio": ratio, "vocab_size": 8},
      {"model.layers.0.mlp.gate_proj.weight": np.zeros((1, 1))},
    )


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("hidden_act", "gelu"),
    ("feature_map", "relu"),
    ("use_short_conv", True),
    ("use_output_gate", False),
    ("elementwise_affine", False),
    ("attn", {"layers": [0], "num_heads": 2}),
    ("attnres_block_size", 4),
  ],
)
def test_fla_refuses_options(fla, option, value):
  config, params, _ = fla
  with pytest.raises(ValueError) as caught:
    from_fla(config | {option: value}, params)
  assert f"{option} is {value!r}, which is not supported; expected" in str(caught.value)


def test_fla_parameters_are_used_exactly_once(fla):
  config, params, _ = fla
  renamed = {k.replace("g_norm", "o_norm"): v for k, v in params.items()}
  with pytest.raises(ValueError) as caught:
    from_fla(config, renamed)
  for i in range(2):
    assert f"model.layers.{i}.attn.g_norm_swish_gate.weight" in str(caught.value)
    assert f"model.layers.{i}.attn.o_norm.weight" in str(caught.value)
