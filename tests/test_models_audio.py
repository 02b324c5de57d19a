"""Models of samples: the laws of the interface, whose answer to a call is one for every row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from triform.arch import Encoder, Hybrid, LMUFormer, build, put_rows, state_bytes, take_rows
from triform.arch.flops import Call, abstract_model, count, walk
from triform.arch.interface import FORMS
from triform.arch.layers.batch_norm import BatchNorm
from triform.arch.layers.frequency_conv import FrequencyConv
from triform.arch.layout import split_model

FRONT_END = "fbank(sample_frequency=400.0)"  # frames of 10 samples, every 4
SIZES = {"front_end": FRONT_END, "in_features": 4, "num_classes": 3, "d_model": 8, "num_layers": 1}
LMUFORMER = {"mlp_ratio": 2, "order": 4, "theta": 6.0, "memory_channels": 2, "chunk_size": 4}
PATTERNS = {
  "retention": "retention",
  "primer": "mdha(max_len=64)",
}
ENCODER = {"num_heads": 2, "ffn_dim": 12, "chunk_size": 4}
MODELS = {
  "same": functools.partial(LMUFormer, **SIZES, **LMUFORMER, padding="same"),
  "causal": functools.partial(LMUFormer, **SIZES, **LMUFORMER, stem_channels=(4,)),
  "spiking": functools.partial(
    LMUFormer, **SIZES, **LMUFORMER, padding="same", variant="spiking_ms", stem_channels=(4, 4)
  ),
  **{
    name: functools.partial(Encoder, **SIZES, **ENCODER, pattern=pattern)
    for name, pattern in PATTERNS.items()
  },
}
NAMES = [n if n == "retention" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
N = 60


@functools.cache
def model_of(name):
  with jax.enable_x64(True):
    model = MODELS[name](param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    for _, part in nnx.iter_modules(model):
      if isinstance(part, BatchNorm):
        part.momentum = 0.0  # statistics become those of the call
    return split_model(trained(model, samples(rows=8)))


@nnx.jit
def trained(model, x):
  model(x, rngs=nnx.Rngs(0))
  return model


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(graphdef, form, params, variables, x, state, reset, mask):
  model = nnx.merge(graphdef, params, variables)
  y, after = model(x, state, form=form, reset=reset, mask=mask)
  return y, after, model.read_out(after)


def call(name, x, state=None, form="chunkwise", reset=None, mask=None):
  graphdef, params, variables = model_of(name)
  reset = np.zeros(x.shape, bool) if reset is None else reset
  mask = np.ones(x.shape, bool) if mask is None else mask
  with jax.enable_x64(True):
    if state is None:
      state = nnx.merge(graphdef, params, variables).init_state(len(x))
    return run(graphdef, form, params, variables, x, state, reset, mask)


def samples(seed=0, rows=2, length=N):
  return np.random.default_rng(seed).standard_normal((rows, length)) * 0.1


def same(a, b, exactly=False):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if exactly:
      np.testing.assert_array_equal(x, y)
    else:
      np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_forms_agree_and_a_clip_needs_no_state_to_begin_with(name):
  x = samples()
  graphdef, params, variables = model_of(name)
  expected = call(name, x)
  with jax.enable_x64(True):
    whole = nnx.merge(graphdef, params, variables)(x)
  same(expected[:2], whole)
  same(expected[2], expected[0])
  for form in ("parallel", "recurrent"):
    same(call(name, x, form=form), expected)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_splits_compose(name, data):
  x = samples(data.draw(st.integers(0, 9)))
  expected = call(name, x)
  state, y = None, None
  for size in data.draw(st.sampled_from([(1, 24, 35), (10, 50), (4, 4, 52), (35, 1, 24)])):
    form = data.draw(st.sampled_from(FORMS[1:]))
    y, state, _ = call(name, x[:, :size], state, form)
    x = x[:, size:]
  same((y, state), expected[:2])


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 9))
def test_padding_is_an_identity(name, seed):
  x, rng = samples(seed), np.random.default_rng(seed)
  mask = rng.random(x.shape) < 0.8
  y, state, answer = call(name, np.where(mask, x, np.nan), mask=mask)
  for row in range(2):
    alone = call(name, x[row : row + 1][:, mask[row]])
    same((y[row], answer[row]), (alone[0][0], alone[2][0]))
    same(take_rows(state, np.array([row])), alone[1])
  still = call(name, np.where(mask, x, np.nan), state, mask=np.zeros_like(mask))
  same(still[1], state, exactly=True)
  same(still[0], answer)


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_begins_a_document(name):
  x, reset = samples(), np.zeros((2, N), bool)
  reset[0, [5, 23]] = True
  _, before, _ = call(name, samples(1))
  y, state, _ = call(name, x, before, reset=reset)
  alone, own, _ = call(name, x[:1, 23:])
  other, theirs, _ = call(name, x, before)
  same(y, np.concatenate([alone, other[1:]]))
  same(state, put_rows(theirs, np.array([0]), own))


@pytest.mark.parametrize(
  "name",
  [n if n == "retention" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_gradients_agree_between_forms(name):
  graphdef, params, variables = model_of(name)
  x = samples()
  with jax.enable_x64(True):

    def loss(params, x, form):
      y, _ = nnx.merge(graphdef, params, variables)(x, form=form)
      return (y**2).sum()

    gradients = [
      jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(params, x, form) for form in FORMS
    ]
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients[0]))
  same(gradients[1], gradients[0])
  same(gradients[2], gradients[0])


@pytest.mark.parametrize("name", ["same", "causal", "retention"])
def test_states_do_not_grow_and_look_ahead_is_told_in_samples(name):
  model = MODELS[name](rngs=nnx.Rngs(0))
  assert model.lookahead == (20 if name == "same" else 0)
  states = [jax.eval_shape(lambda n=n: model(jnp.zeros((3, n)))[1]) for n in (10, 50)]
  assert state_bytes(states[0]) == state_bytes(states[1]) == state_bytes(model.init_state(3))


@pytest.mark.parametrize("name", ["same", "retention"])
def test_frames_are_taken_in_the_place_of_samples(name):
  model = MODELS[name](rngs=nnx.Rngs(0))
  x = samples().astype(np.float32)
  mask = np.arange(N)[None] < np.array([[60], [31]])
  frames, real, _ = model.front_end(x, mask=mask)
  y, state = model(x, mask=mask)
  of_frames, after = model(frames, mask=real)
  np.testing.assert_allclose(of_frames, y, atol=1e-6)
  np.testing.assert_array_equal(after.count, state.count)
  with pytest.raises(ValueError, match=r"x has shape \[2, 9, 5\], expected \[batch, time, 4\]"):
    model(jnp.zeros((2, 9, 5)))


@pytest.mark.parametrize("name", ["retention", pytest.param("same", marks=pytest.mark.slow)])
def test_features_of_samples_are_those_of_their_frames(name):
  model = MODELS[name](rngs=nnx.Rngs(0))
  x = samples().astype(np.float32)
  whole, state = model.encode(x)
  frames = int(state.count[0])
  assert frames == model.front_end.analysis.num_frames(N)
  start, middle = model.encode(x[:, :25])
  rest, _ = model.encode(x[:, 25:], middle)
  before = int(middle.count[0])
  np.testing.assert_allclose(start[:, :before], whole[:, :before], atol=1e-5)
  np.testing.assert_allclose(rest[:, : frames - before], whole[:, before:frames], atol=1e-5)
  assert model.flush(state).shape == (2, 5 if name == "same" else 0, 8)


def test_audio_too_short_for_a_frame_has_the_answer_of_silence():
  """The bias of the head, and the state goes on from there."""
  model = MODELS["causal"](rngs=nnx.Rngs(0))
  model.head.bias[...] = jnp.arange(3.0)
  x = samples().astype(np.float32)
  y, state = model(x[:, :6])
  np.testing.assert_array_equal(y, np.tile(np.arange(3.0), (2, 1)))
  y, _ = model(x[:, 6:], state)
  np.testing.assert_allclose(y, model(x)[0], atol=1e-5)


BIDIRECTIONAL = {**SIZES, **ENCODER, "pattern": "bidirectional_hypermixing(mixing_dim=8)"}


def test_whole_sequences_have_no_state():
  model = Encoder(**BIDIRECTIONAL, rngs=nnx.Rngs(0))
  x = samples().astype(np.float32)
  mask = np.arange(N)[None] < np.array([[60], [31]])
  y, state = model(np.where(mask, x, np.nan), mask=mask)
  assert state == () and not model.causal
  np.testing.assert_allclose(y[1:], model(x[1:, :31])[0], atol=1e-6)
  for form in ("chunkwise", "recurrent"):
    np.testing.assert_allclose(model(x, form=form)[0], model(x)[0], atol=1e-5)
  later = x.copy()
  later[:, -10:] *= -3
  early = slice(0, 3)
  changed = model.encode(later)[0][:, early] - model.encode(x)[0][:, early]
  assert np.abs(changed).max() > 1e-6
  assert (model(x, model.init_state(2))[0] == model(x)[0]).all()
  with pytest.raises(NotImplementedError, match="goes on from no state; expected None"):
    model(x, (1,))
  with pytest.raises(ValueError, match="reset is given, expected none"):
    model(x, reset=np.zeros(x.shape, bool))
  with pytest.raises(NotImplementedError, match="sees whole sequences and keeps no state"):
    model.read_out(())


def test_a_language_model_refuses_what_sees_later_tokens():
  sizes = {"vocab_size": 9, "d_model": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 8}
  with pytest.raises(ValueError, match="Hybrid has a mixer that sees later tokens, expected"):
    Hybrid(**sizes, pattern=BIDIRECTIONAL["pattern"], rngs=nnx.Rngs(0))


def test_a_frequency_convolution_is_the_sum_it_says():
  layer = FrequencyConv(
    3 * 5 * 2,
    3 * 4,
    frames=3,
    bins=5,
    width=3,
    use_bias=True,
    kernel_init=nnx.initializers.normal(),
    dtype=None,
    param_dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  x = np.random.default_rng(0).standard_normal((2, 7, 3, 5, 2)).astype(np.float32)
  kernel = np.asarray(layer.linear.kernel[...]).reshape(3, 3, 2, 4)  # bin, frame, in, out
  expected = np.zeros((2, 7, 3, 4))
  for j in range(3):
    for i in range(3):
      if 0 <= (at := 2 * j + i - 1) < 5:
        expected[:, :, j] += np.einsum("btfc,fco->bto", x[:, :, :, at], kernel[i])
  y = layer(x.reshape(2, 7, -1)).reshape(expected.shape)
  np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"stem_channels": (4, 4, 4, 4)}, r"stem_channels is \(4, 4, 4, 4\), expected at most 3"),
    ({"stem_channels": (0,)}, r"stem_channels is \(0,\), expected at most 3 positive numbers"),
    ({"front_end": "wave"}, "front_end 'wave' has the unknown name 'wave'"),
  ],
)
def test_what_cannot_be_is_told(options, message):
  with pytest.raises(ValueError, match=message):
    build({"architecture": "lmuformer", **SIZES, **LMUFORMER, **options}, rngs=nnx.Rngs(0))


COUNTED = {
  "same": {"architecture": "lmuformer", **SIZES, **LMUFORMER, "padding": "same"},
  "frequency": {"architecture": "lmuformer", **SIZES, **LMUFORMER, "stem_channels": (4, 3)},
  "cepstra": {"architecture": "encoder", **SIZES, **ENCODER, "front_end": "mfcc"},
  "biased": {"architecture": "encoder", **SIZES, **ENCODER, "gated": False, "activation": "gelu"},
}


@pytest.mark.parametrize("context", [0, 30], ids=["from_the_start", "continued"])
@pytest.mark.parametrize("name", COUNTED)
def test_closed_forms_of_audio_models_are_exact(name, context):
  model = abstract_model(COUNTED[name])
  graphdef, params, variables = split_model(model)
  state = jax.eval_shape(lambda: model.init_state(1)) if context else None
  x = jax.ShapeDtypeStruct((1, N), jnp.float32)

  def f(params, variables, x, state):
    y, after = nnx.merge(graphdef, params, variables)(x, state, form="chunkwise")
    return y, after

  ours = count(model, Call(N, "chunkwise", context=context)).forward
  traced = walk(f, params, variables, x, state)
  assert ours == traced
