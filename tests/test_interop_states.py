"""A sequence that one library begins and the other ends.

The other libraries are here as NumPy restatements of their recurrent forms, in float64, which the
first test of each holds to the numbers that the library itself computed (`data/retnet_*.npz`).
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from published import DATA, LAYOUTS

from triform.arch import RetNet
from triform.arch.interop import (
  from_fla,
  from_torchscale,
  state_from_fla,
  state_from_torchscale,
  state_to_fla,
  state_to_torchscale,
)

CUTS = pytest.mark.parametrize("cut", [1, 7])


def rms_norm(x, eps, weight=1.0):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
  return x / (1 + np.exp(-x))


class Restatement:
  """A model that takes one token at a time by its `step(ids, cache, n)`, which writes its cache."""

  def __init__(self, config, params):
    self.config = config
    self.params = {name: np.asarray(array, np.float64) for name, array in params.items()}

  def __call__(self, ids, cache=None, length=0):
    cache = {} if cache is None else {i: dict(layer) for i, layer in cache.items()}
    logits = [self.step(ids[:, n], cache, length + n) for n in range(ids.shape[1])]
    return np.stack(logits, axis=1), cache, length + ids.shape[1]


class Torchscale(Restatement):
  """torchscale's `RetNetDecoder` with its `incremental_state`."""

  def step(self, ids, cache, n):
    p, c, eps = self.params, self.config, self.config["layernorm_eps"]
    x = p["embed_tokens.weight"][ids]
    x = x * (1.0 if c["no_scale_embedding"] else c["decoder_embed_dim"] ** 0.5)
    for i in range(c["decoder_layers"]):
      w = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if k.startswith(f"layers.{i}.")}
      x = x + self.retention(w, rms_norm(x, eps, w["retention_layer_norm.weight"]), cache, i, n)
      y = rms_norm(x, eps, w["final_layer_norm.weight"])
      hidden = silu(y @ w["ffn.fc1.weight"].T) * (y @ w["ffn.gate.weight"].T)
      x = x + hidden @ w["ffn.fc2.weight"].T
    return rms_norm(x, eps, p["layer_norm.weight"]) @ p["output_projection.weight"].T

  def retention(self, w, x, cache, i, n):
    heads = self.config["decoder_retention_heads"]
    q, k, v, g = (x @ w[f"retention.{name}_proj.weight"].T for name in "qkvg")
    q, k, v = (a.reshape(len(x), heads, -1) for a in (q, k, v))
    q, k = self.rotate(q, n), self.rotate(k * k.shape[-1] ** -0.5, n)
    decay = np.exp(self.params["retnet_rel_pos.decay"])
    kv = v[..., :, None] * k[..., None, :]
    if i in cache:
      before = np.asarray(cache[i]["scale"], np.float64)
      scale = before * decay + 1
      keep = np.sqrt(before) * decay / np.sqrt(scale)
      kv = (
        np.asarray(cache[i]["prev_key_value"]) * keep[:, None, None]
        + kv / np.sqrt(scale)[:, None, None]
      )
    else:
      scale = np.ones(heads)
    cache[i] = {"prev_key_value": kv, "scale": scale}
    o = rms_norm(np.einsum("bhvk,bhk->bhv", kv, q), self.config["layernorm_eps"])
    return (silu(g) * o.reshape(len(x), -1)) @ w["retention.out_proj.weight"].T

  def rotate(self, x, n):  # neighbours
    angle = n * self.params["retnet_rel_pos.angle"]
    turned = np.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    return x * np.cos(angle) + turned * np.sin(angle)


class Fla(Restatement):
  """fla's `RetNetForCausalLM` with its `recurrent_state` per layer."""

  def step(self, ids, cache, n):
    p, c, eps = self.params, self.config, self.config["norm_eps"]
    x = p["model.embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
      prefix = f"model.layers.{i}."
      w = {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}
      x = x + self.retention(w, rms_norm(x, eps, w["attn_norm.weight"]), cache, i, n)
      y = rms_norm(x, eps, w["mlp_norm.weight"])
      hidden = silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
      x = x + hidden @ w["mlp.down_proj.weight"].T
    return rms_norm(x, eps, p["model.norm.weight"]) @ p["lm_head.weight"].T

  def retention(self, w, x, cache, i, n):
    heads = self.config["num_heads"]
    q, k, v, g = (x @ w[f"attn.{name}_proj.weight"].T for name in "qkvg")
    q, k, v = (a.reshape(len(x), heads, -1) for a in (q, k, v))
    q, k = rotate_halves(q, n), rotate_halves(k, n)
    decay = 1 - 2.0 ** (-5 - np.arange(heads))
    state = k[..., :, None] * v[..., None, :]
    if i in cache:
      state = state + np.asarray(cache[i]["recurrent_state"]) * decay[:, None, None]
    cache[i] = {"recurrent_state": state}
    o = np.einsum("bhkv,bhk->bhv", state, q * q.shape[-1] ** -0.5)
    o = rms_norm(o, self.config["norm_eps"], w["attn.g_norm.weight"])
    return (silu(g) * o.reshape(len(x), -1)) @ w["attn.o_proj.weight"].T


def rotate_halves(x, n):
  size = x.shape[-1]
  first, second = np.split(x, 2, axis=-1)
  z = (first + 1j * second) * np.exp(1j * n * 10000.0 ** (-2 * np.arange(size // 2) / size))
  return np.concatenate([z.real, z.imag], axis=-1)


class Side:
  """A library: its restatement, our importer and converters, and what it computed itself."""

  def __init__(self, name, other, importer, to_other, from_other):
    self.name = name
    arrays = dict(np.load(DATA / f"retnet_{name}.npz"))
    self.config = json.loads(str(arrays["meta"]))["config"]
    self.params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    self.other, self.importer = other(self.config, self.params), importer
    self.to_other, self.from_other = to_other, from_other
    self.ids = arrays["input_ids"]
    self.logits = arrays["logits_recurrent" if name == "torchscale" else "logits"]
    self.last = {
      i: {k: arrays[f"state/{i}/{k}"] for k in ("prev_key_value", "scale")}
      for i in range(2)
      if f"state/{i}/scale" in arrays
    }


@pytest.fixture(scope="module", params=["torchscale", "fla"])
def side(request):
  if request.param == "torchscale":
    converters = (from_torchscale, state_to_torchscale, state_from_torchscale)
    return Side("torchscale", Torchscale, *converters)
  return Side("fla", Fla, from_fla, state_to_fla, state_from_fla)


def error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def test_the_restatement_is_the_library(side):
  logits, cache, length = side.other(side.ids)
  assert length == side.ids.shape[1]
  assert error(logits, side.logits) < 1e-5
  for i, layer in side.last.items():
    for name, array in layer.items():
      assert error(cache[i][name], array) < 1e-5


@LAYOUTS
@CUTS
def test_what_we_begin_the_library_ends(side, cut, scan_layers):
  model = side.importer(side.config, side.params, scan_layers=scan_layers)
  _, state = jax.jit(lambda ids: model(ids, form="chunkwise"))(side.ids[:, :cut])
  cache, length = side.to_other(model, state)
  assert length == cut
  logits, _, _ = side.other(side.ids[:, cut:], cache, length)
  assert error(logits, side.logits[:, cut:]) < 1e-5
  wrong, _, _ = side.other(side.ids[:, cut:], cache, length + 1)
  assert error(wrong, side.logits[:, cut:]) > 1e-3  # positions count


@LAYOUTS
@CUTS
def test_what_the_library_begins_we_end(side, cut, scan_layers):
  model = side.importer(side.config, side.params, scan_layers=scan_layers)
  _, cache, length = side.other(side.ids[:, :cut])
  state = side.from_other(model, cache, length)
  logits, _ = jax.jit(lambda ids, state: model(ids, state))(side.ids[:, cut:], state)
  assert error(logits, side.logits[:, cut:]) < 1e-5


@LAYOUTS
def test_there_and_back(side, scan_layers):
  model = side.importer(side.config, side.params, scan_layers=scan_layers)
  _, state = jax.jit(model)(side.ids)
  back = side.from_other(model, *side.to_other(model, state))
  assert jax.tree.structure(back) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=3e-7)


def test_states_of_another_model_are_refused(side):
  model = side.importer(side.config, side.params)
  _, cache, length = side.other(side.ids[:, :2])
  for options, message in (
    ({"dialect": "fla" if side.name == "torchscale" else "torchscale"}, "dialect is "),
    ({"dialect": side.name, "decay": "gated"}, "decay is 'gated', which cannot be converted"),
  ):
    sizes = {"vocab_size": 8, "d_model": 8, "num_heads": 2, "value_dim": 8, "ffn_dim": 8}
    other = RetNet(**sizes, num_layers=1, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
      side.to_other(other, other.init_state(2))
    with pytest.raises(ValueError, match=message):
      side.from_other(other, cache, length)
  with pytest.raises(ValueError, match="the cache has 1 layers, expected 2"):
    side.from_other(model, {0: cache[0]}, length)
  narrow = {i: {k: a[..., :4] for k, a in layer.items()} for i, layer in cache.items()}
  with pytest.raises(ValueError, match=r"the state of layer 0 is \[.*\], expected \["):
    side.from_other(model, narrow, length)
  with pytest.raises(ValueError, match=r"positions are \[0 0\], expected the same in all rows"):
    side.to_other(model, model.init_state(2))
