"""Closed forms of Legendre memories and LMUFormer against traced programs and published counts."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest
from counted import classified, gradient
from flax import nnx

from triform.arch.flops import Call, Work, count, walk
from triform.arch.interface import FORMS
from triform.arch.layers.normed import fold_batch_norm
from triform.arch.layout import split_model
from triform.arch.mixers.lmu import LMU
from triform.arch.models.lmu import LMUClassifier
from triform.arch.models.lmuformer import LMUFormer

LENGTHS = {"parallel": (7, 300), "chunkwise": (7, 8), "recurrent": (7,)}
I = 3
MIXERS = {
  "plain": {},
  "memory": {"hidden_size": None},
  "memory-alone": {"hidden_size": None, "input_to_hidden": False},
  "no-input": {"input_to_hidden": False, "hidden_bias": False, "use_bias": False},
  "tanh-gelu": {"input_activation": "tanh", "hidden_activation": "gelu"},
  "narrow": {"hidden_size": 3, "channels": 1},  # less work with the response folded
  "wide": {"hidden_size": 40, "dtype": jnp.bfloat16},
  "euler": {"discretizer": "euler", "theta": 30.0},
}
FEEDBACK = [
  {"hidden_to_memory": True},
  {"memory_to_memory": True, "hidden_size": None},
  {"memory_to_memory": True, "hidden_size": None, "input_to_hidden": False},
  {
    "hidden_to_memory": True,
    "memory_to_memory": True,
    "hidden_activation": "tanh",
    "use_bias": False,
    "hidden_bias": False,
  },
  {"memory_to_memory": True, "input_to_hidden": False, "input_activation": "gelu"},
]
FORMERS = {
  "plain": {"variant": "plain", "order": 4},
  "plain-apart": {"variant": "plain", "order": 3, "memory_channels": 2, "dropout": 0.1},
  "plain-bfloat16": {"variant": "plain", "dtype": "bfloat16", "in_features": 1},
  "plain-frequency": {"variant": "plain", "in_features": 5, "stem_channels": (4, 3)},
  "spiking_ms": {"variant": "spiking_ms"},
  "spiking_ms-soft": {"variant": "spiking_ms", "reset_value": None, "detach_reset": False},
  "spiking_ms-tau": {"variant": "spiking_ms", "learn_tau": True, "surrogate": "atan"},
  "spiking": {"variant": "spiking", "memory_channels": 2},
  "spiking-hard": {
    "variant": "spiking", "surrogate": "triangle", "reset_value": 0.3, "detach_reset": False,
  },
}  # fmt: skip
PADDINGS = ("causal", "same")
QUICK = {
  ("plain", "causal", "chunkwise"), ("spiking_ms", "same", "parallel"),
  ("spiking", "causal", "recurrent"), ("plain", "same", "dots"), ("spiking_ms", "causal", "full"),
}  # fmt: skip


def every_former(third, values):
  """All of `FORMERS` with both paddings, the published ones with all values of a third parameter.

  Of the others each has one of these, in turn. But for a few they are slow.
  """
  runs = [
    (name, padding, value)
    for i, name in enumerate(FORMERS)
    for j, padding in enumerate(PADDINGS)
    for k, value in enumerate(values)
    if name in ("plain", "spiking_ms") or (i + j + k) % len(values) == 0
  ]
  runs = [pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow) for run in runs]
  return pytest.mark.parametrize(("name", "padding", third), runs)


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def mixer(**options):
  sizes = {"order": 4, "theta": 6.0, "channels": 2, "hidden_size": 5, "chunk_size": 4}
  return nnx.eval_shape(lambda: LMU(I, **{**sizes, **options}, rngs=nnx.Rngs(0)))


def former(name="plain", padding="causal", *, fold=False, **options):
  sizes = {
    "in_features": I, "num_classes": 5, "d_model": 4, "num_layers": 2, "mlp_ratio": 2,
    "theta": 6.0, "chunk_size": 4, "scan_layers": False,
  }  # fmt: skip

  def build():
    model = LMUFormer(**{**sizes, **FORMERS[name], "padding": padding, **options}, rngs=nnx.Rngs(0))
    return fold_batch_norm(model) if fold else model

  return nnx.eval_shape(build)


def inputs(layer, length):
  return spec(1, length, I, dtype=layer.dtype)


def inferred(layer, call):
  graphdef, params, rest = split_model(layer)
  state = jax.eval_shape(lambda: layer.init_state(1)) if call.context else None

  def run(params, rest, x, state):
    return nnx.merge(graphdef, params, rest)(x, state, form=call.form)

  return walk(run, params, rest, inputs(layer, call.length), state)


def assert_exact(layer, call):
  counted = count(layer, call)
  if not call.training:
    assert counted.forward == inferred(layer, call), call
    return
  forward, both = gradient(layer, call, inputs(layer, call.length))
  assert counted.forward == forward, call
  assert counted.forward + counted.backward == both, call


def mixer_calls(length, form):
  training = Call(length, form, training=True)
  return (
    training,
    training._replace(packed=False),
    Call(length, form),
    Call(length, form, context=3),
  )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n == "narrow" else pytest.mark.slow) for n in MIXERS]
)
def test_the_closed_form_of_the_unit_is_exact(name, form):
  layer = mixer(**MIXERS[name])
  for length in LENGTHS[form]:
    for call in mixer_calls(length, form):
      assert_exact(layer, call)


@pytest.mark.parametrize("options", FEEDBACK, ids=lambda options: "-".join(options))
def test_the_closed_form_of_a_unit_with_feedback_is_exact(options):
  layer = mixer(**options)
  for call in mixer_calls(7, "recurrent"):
    assert_exact(layer, call)
  with pytest.raises(NotImplementedError, match="form is 'parallel', but an LMU with feedback"):
    count(layer, Call(7, "parallel"))


def test_a_hidden_cell_brings_its_own_closed_form():
  layer = mixer(hidden_size=None, hidden_cell=lambda n, rngs: nnx.GRUCell(n, 4, rngs=rngs))
  with pytest.raises(NotImplementedError, match="GRUCell has no closed form"):
    count(layer, Call(7, "parallel"))


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_a_learned_theta_are_left_out(form):
  """All else is counted: products with weights, and the gradients of products with tables."""
  fixed, learned = mixer(), mixer(learn_theta=True)
  call = Call(7, form, training=True)
  assert count(learned, call).forward == count(fixed, call).forward
  ours, theirs = count(learned, call), gradient(learned, call, inputs(learned, 7))[1]
  assert ours.backward.mixing == 2 * ours.forward.mixing
  both = ours.forward + ours.backward
  assert both.matmul == theirs.matmul and both.mixing < theirs.mixing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "options", [{}, {"hidden_size": 3, "channels": 2, "in_features": 2, "dropout": 0.1}], ids=str
)
def test_the_closed_form_of_the_classifier_is_exact(options, form):
  sizes = {"order": 4, "theta": 6.0, "hidden_size": 6, "chunk_size": 4, "num_classes": 3}
  model = nnx.eval_shape(lambda: LMUClassifier(**{**sizes, **options}, rngs=nnx.Rngs(0)))
  for length in LENGTHS[form]:
    for call in (Call(length, form, True), Call(length, form), Call(length, form, context=3)):
      counted = count(model, call)
      ours = counted.forward + counted.backward if call.training else counted.forward
      assert ours == classified(model, call, spec(1, length, model.lmu.d_model)), call


def test_a_classifier_needs_the_last_memory_alone():
  layer = {"order": 4, "channels": 2, "in_features": 3, "hidden_size": 6}
  model = nnx.eval_shape(lambda: LMUClassifier(**layer, theta=6.0, rngs=nnx.Rngs(0)))
  for length in (10, 300):
    call = Call(length, "parallel", training=True, causal=True)
    counted = count(model, call)
    assert counted.forward.mixing == counted.backward.mixing == 2 * length * 2 * 4
    assert counted.forward.matmul == 2 * (length * 3 * 2 + (2 * 4 + 3) * 6)


@every_former("form", FORMS)
def test_closed_forms_of_lmuformer_are_exact(name, padding, form):
  model = former(name, padding)
  for length in (300, 8) if form == "parallel" else (8, 3):
    for call in (Call(length, form, True), Call(length, form), Call(length, form, context=3)):
      counted = count(model, call)
      ours = counted.forward + counted.backward if call.training else counted.forward
      assert ours == classified(model, call, spec(1, length, model.stem.in_features)), call


@pytest.mark.parametrize("variant", ["plain", "spiking_ms", "spiking"])
def test_folded_norms_are_not_counted(variant):
  model = former(variant, fold=True)
  for call in (Call(8, "parallel"), Call(1, "recurrent", context=3)):
    assert count(model, call).forward == classified(model, call, spec(1, call.length, I)), call


@every_former("remat", ("dots", "full"))
def test_recomputation_in_lmuformer_is_counted_exactly(name, padding, remat):
  call = Call(8, "parallel", training=True)
  model = former(name, padding, remat=remat)
  counted = count(model, call)
  every = counted.forward + counted.backward + counted.recompute
  assert every == classified(model, call, spec(1, 8, model.stem.in_features))
  without = count(former(name, padding), call)
  assert dataclasses.replace(counted, recompute=Work()) == without


PUBLISHED = 128  # frames
CONVOLUTIONS = 98_304 + 589_824 + 196_608
PROJECTION, FEED_FORWARD, HEAD = 65_536, 524_288, 8_960


def macs(variant, form="parallel", padding="same"):
  """Multiply-adds of a published clip, in products with weights and with tables."""
  model = nnx.eval_shape(lambda: LMUFormer(variant=variant, padding=padding, rngs=nnx.Rngs(0)))
  work = count(model, Call(PUBLISHED, form, causal=True)).forward
  return [one / 2 for one in (work.convolution, work.matmul, work.logits, work.mixing)]


@pytest.mark.parametrize(
  ("variant", "read", "recurrent", "convolved"),
  [("plain", 131_072, 65_792, 16_512), ("spiking_ms", 196_608, 262_656, 33_024)],
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_published_multiply_adds(variant, read, recurrent, convolved, padding):
  """The published head is applied to every frame, ours once, to the mean."""
  written = 256
  convolution, matmul, logits, memory = macs(variant, padding=padding)
  assert convolution == PUBLISHED * CONVOLUTIONS
  assert matmul == PUBLISHED * (written + read + PROJECTION + FEED_FORWARD)
  assert logits == HEAD
  assert memory == PUBLISHED * convolved
  assert macs(variant, "recurrent", padding) == [convolution, matmul, logits, PUBLISHED * recurrent]
  clip = convolution + matmul + PUBLISHED * HEAD
  assert clip == pytest.approx(206.7e6 if variant == "plain" else 215.1e6, abs=0.05e6)
  if variant == "plain":
    assert clip == PUBLISHED * 1_614_848
    # What the paper compares: without the unit's own layers and its memory.
    assert clip - PUBLISHED * (written + read) == pytest.approx(189.9e6, abs=0.05e6)


def test_a_long_convolution_is_a_transform_here_and_elsewhere_later(monkeypatch):
  kernel = importlib.import_module("triform.kernels.lmu.api")
  layer = mixer(hidden_size=None)
  transformed = count(layer, Call(300, "parallel")).forward.mixing
  monkeypatch.setitem(kernel.FFT_FROM, "cpu", 2048)
  assert count(layer, Call(300, "parallel")).forward.mixing > 5 * transformed
