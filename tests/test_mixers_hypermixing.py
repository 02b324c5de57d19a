"""HyperMixing of whole sequences, and its classifier, beside the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws_errors import EXACT, error

from triform.arch import (
  CausalHyperMixing,
  Classifier,
  HyperMixerClassifier,
  HyperMixing,
  Stack,
  generate,
)
from triform.arch.interface import FORMS
from triform.arch.layers.hypernetwork import Hypernetwork
from triform.arch.models.classifier import TokenEmbedding

every_form = pytest.mark.parametrize("form", FORMS)


def layer(**options):
  sizes = {"num_heads": 2, "mixing_dim": 12, "chunk_size": 4, "position": "official", **options}
  return HyperMixing(8, **sizes, rngs=nnx.Rngs(0))


def numbers(*shape):
  return np.random.default_rng(0).normal(size=shape)


def test_two_passes_over_pieces_are_the_whole():
  mask = np.random.default_rng(1).random((2, 13)) < 0.8
  with jax.enable_x64():
    mixer, x = layer(param_dtype=jnp.float64), numbers(2, 13, 8)
    pieces = [(x[:, i : i + 5], mask[:, i : i + 5]) for i in (0, 5, 10)]
    total = None
    for piece, real in pieces:
      total = mixer.accumulate(piece, real, total=total)
    np.testing.assert_array_equal(total.position, mask.sum(axis=1))
    start, outputs = 0, []
    for piece, real in pieces:
      outputs.append(mixer.read_out(total, piece, real, start=start))
      start = start + real.sum(axis=1)
    y, state = mixer(x, mask=mask)
  assert state == ()
  assert error(np.concatenate(outputs, axis=1), y) <= EXACT


@every_form
def test_cross_mixing_reads_other_tokens(form):
  """Of any number, with a padding of their own; their values apart if they are a pair."""
  with jax.enable_x64():
    mixer = layer(param_dtype=jnp.float64)
    x, keys, values = numbers(2, 3, 8), numbers(2, 9, 8) + 1, numbers(2, 9, 8) - 1
    memory_mask = np.arange(9)[None] < np.array([[9], [6]])
    y, _ = mixer(x, form=form, memory=(keys, values), memory_mask=memory_mask)
    total = mixer.accumulate(keys, memory_mask, values=values)
    assert error(y, mixer.read_out(total, x)) <= EXACT
    short, _ = mixer(x[1:], form=form, memory=(keys[1:, :6], values[1:, :6]))
    assert error(y[1:], short) <= EXACT
    alone, _ = mixer(x, form=form, memory=keys)
    assert error(alone, mixer(x, form=form, memory=(keys, keys))[0]) <= EXACT


def test_padding_is_the_bias_of_the_norm():
  mixer = layer()
  mixer.norm.bias[...] = jnp.arange(8.0)
  mask = np.arange(5)[None] < np.array([[3], [5]])
  y, _ = mixer(np.float32(numbers(2, 5, 8)), mask=mask)
  np.testing.assert_array_equal(y[0, 3:], np.broadcast_to(np.arange(8.0), (2, 8)))


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda m, x: m(x, m.accumulate(x)), NotImplementedError, "goes on from no state; Causal"),
    (lambda m, x: m(x, reset=np.zeros((2, 3), bool)), NotImplementedError, "so a reset is none"),
    (lambda m, x: m(x, form="serial"), ValueError, "form is 'serial'"),
  ],
)
def test_what_cannot_be_is_refused(call, error, message):
  with pytest.raises(error, match=message):
    call(layer(), np.float32(numbers(2, 3, 8)))


@pytest.mark.parametrize(
  ("options", "arguments", "message"),
  [
    ({"tied": True}, {"memory": (2, 3, 8)}, "memory is given to a tied layer"),
    ({}, {"memory": (1, 3, 8)}, r"shapes \[\[1, 3, 8\], \[1, 3, 8\]\], expected \[2, time, 8\]"),
    ({}, {"memory": (2, 3, 8), "memory_mask": (2, 4)}, r"memory_mask has shape \[2, 4\], expected"),
    ({}, {"memory_mask": (2, 3)}, "memory_mask is given without memory"),
    ({}, {"x": (2, 3, 1)}, r"x has shape \[2, 3, 1\], expected \[batch, time, 8\]"),
  ],
)
def test_bad_memory_is_told(options, arguments, message):
  shapes = {"x": (2, 3, 8), **arguments}
  arrays = {name: np.ones(s, bool if "mask" in name else np.float32) for name, s in shapes.items()}
  with pytest.raises(ValueError, match=message):
    layer(**options)(**arrays)


def test_a_sum_is_no_memory():
  mixer, x = layer(), np.float32(numbers(2, 3, 8))
  with pytest.raises(ValueError, match="memory is a HyperMixingState, expected tokens"):
    mixer(x, memory=mixer.accumulate(x))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_heads": 0}, "num_heads is 0, expected at least 1"),
    ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
    ({"num_heads": 3}, "d_model 8 is not divisible by num_heads 3"),
    ({"mixing_dim": 9}, "mixing_dim 9 is not divisible by num_heads 2"),
    ({"position": "learned"}, "position is 'learned', expected one of standard, official, none"),
    ({"activation": "tanh"}, "activation is 'tanh', expected one of gelu, relu"),
    ({"init": "xavier"}, "init is 'xavier', expected per_head or official"),
  ],
)
def test_bad_options_are_told(options, message):
  with pytest.raises(ValueError, match=message):
    layer(**options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"decay": "learned"}, "decay is 'learned', expected one of none, fixed"),
    (
      {"normalizer": "sqrt"},
      "normalizer is 'sqrt', expected one of none, mean, variance, row_rms, head_rms",
    ),
  ],
)
def test_bad_options_of_the_causal_layer_are_told(options, message):
  with pytest.raises(ValueError, match=message):
    CausalHyperMixing(8, num_heads=2, mixing_dim=12, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("normalizer", ["row_rms", "head_rms"])
def test_rms_keeps_the_sum_in_scale(normalizer):
  """The activation's argument at any length, though the rows of a token's two parts are alike."""
  mixer = CausalHyperMixing(
    64, num_heads=4, mixing_dim=64, normalizer=normalizer, decay="fixed", layer_norm=False,
    position="none", rngs=nnx.Rngs(0),
  )  # fmt: skip
  y, _ = mixer(np.float32(numbers(1, 2048, 64)), form="chunkwise")
  early, late = (np.std(y[:, part]) for part in (slice(16, 64), slice(-256, None)))
  assert 0.5 < late / early < 2


@pytest.mark.parametrize(("init", "expected"), [("per_head", 0.177), ("official", 0.029)])
def test_initial_weights_are_as_told(init, expected):
  """Standard deviations at 512 channels, 512 hidden units and 8 heads."""
  network = Hypernetwork(8, 64, 64, init=init, rngs=nnx.Rngs(0))
  for part in (network.input, network.output):
    assert np.std(part.kernel[...]) == pytest.approx(expected, rel=0.03)


SIZES = {
  "vocab_size": 32, "num_classes": 3, "d_model": 8, "num_layers": 2, "num_heads": 2,
  "mixing_dim": 12, "ffn_dim": 12, "chunk_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_classifier_hears_whole_sequences(scan_layers):
  model = HyperMixerClassifier(**SIZES, scan_layers=scan_layers, rngs=nnx.Rngs(0))
  ids = np.arange(14).reshape(2, 7)
  mask = np.arange(7)[None] < np.array([[7], [5]])
  outputs = {form: model(ids, form=form, mask=mask)[0] for form in FORMS}
  assert outputs["parallel"].shape == (2, 3)
  for y in outputs.values():
    np.testing.assert_allclose(y, outputs["parallel"], atol=1e-5)
  alone, _ = model(ids[1:, :5])
  np.testing.assert_allclose(outputs["parallel"][1:], alone, atol=1e-5)
  assert not model.causal


@pytest.mark.parametrize("scan", [False, True])
def test_a_classifier_of_causal_blocks_goes_on(scan):
  """Logits of the mean of all features of the current document, whatever the pieces."""
  rngs = nnx.Rngs(0)
  dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  model = Classifier(
    TokenEmbedding(32, 8, scale=8**0.5, **dtypes, rngs=rngs),
    Stack(
      lambda rngs: CausalHyperMixing(8, num_heads=2, mixing_dim=12, rngs=rngs),
      2,
      scan=scan,
      rngs=rngs,
    ),
    norm=nnx.LayerNorm(8, rngs=rngs),
    d_model=8,
    num_classes=3,
    rngs=rngs,
  )
  assert model.causal and not model.lookahead
  ids, mask = np.arange(16).reshape(2, 8), np.ones((2, 8), bool)
  reset = np.zeros_like(mask)
  reset[0, 3] = mask[1, 2] = mask[1, 4:] = True
  mask[1, [0, 6]] = False
  logits, state = model(ids[:, :5], form="parallel", reset=reset[:, :5], mask=mask[:, :5])
  logits, state = model(ids[:, 5:], state, form="recurrent", reset=reset[:, 5:], mask=mask[:, 5:])
  np.testing.assert_array_equal(model.read_out(state), logits)
  np.testing.assert_array_equal(state.count, [5, 6])
  for row, document in enumerate((ids[:1, 3:], ids[1:, [1, 2, 3, 4, 5, 7]])):
    features, _ = model.encode(document)
    assert features.shape == (*document.shape, 8)
    expected = model.head(features.mean(axis=1))[0]
    np.testing.assert_allclose(logits[row], expected, atol=1e-5)


def test_a_classifier_that_sees_all_has_no_state():
  model = HyperMixerClassifier(**SIZES, rngs=nnx.Rngs(0))
  assert model.init_state(2) == () and not model.lookahead
  for method in (model.read_out, model.flush):
    with pytest.raises(NotImplementedError, match="HyperMixerClassifier sees whole sequences and"):
      method(())


def test_a_classifier_learns():
  """Whether the first token stands again later: nothing that one token tells."""
  model = HyperMixerClassifier(**{**SIZES, "num_classes": 2, "d_model": 16}, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 32, (64, 6))
  labels = (ids[:, :1] == ids[:, 1:]).any(axis=1)
  flip = rng.random(64) < 0.5
  ids[flip, 3], labels[flip] = ids[flip, 0], True
  graphdef, params = nnx.split(model)

  @jax.jit
  def step(params):
    def loss(params):
      logits, _ = nnx.merge(graphdef, params)(ids)
      return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None].astype(int), 1).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 0.3 * jnp.sign(g) * 0.03, params, gradients)

  losses = []
  for _ in range(100):
    value, params = step(params)
    losses.append(float(value))
  assert losses[-1] < 0.5 * losses[0]


def test_generation_with_a_bidirectional_model_is_refused():
  model = HyperMixerClassifier(**SIZES, rngs=nnx.Rngs(0))
  with pytest.raises(NotImplementedError, match="HyperMixerClassifier sees whole sequences"):
    generate(model, np.arange(4)[None], max_new_tokens=2)
