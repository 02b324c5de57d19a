"""Causal HyperMixing and its positions: bare kernels against float64 NumPy and exact integers.

`data/hypermixing_causal.npz`: a derivation in NumPy and PyTorch, float64, with every normaliser.
"""

import functools
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from laws_cases import masks, resets
from laws_errors import EXACT, error

from triform import kernels
from triform.kernels import FORMS
from triform.kernels.hypermixing import reference

CHUNK = 4
B, H, K, V = 2, 3, 4, 5
every_form = pytest.mark.parametrize("form", FORMS)
every_rms = pytest.mark.parametrize("rms", [None, "row", "head"])


@functools.partial(jax.jit, static_argnames=("form", "rms", "activation"))
def mix(arrays, reset, mask, form, rms=None, activation="gelu"):
  operator = functools.partial(kernels.causal_hypermixing, form=form, chunk_size=CHUNK)
  return call(operator, arrays, reset, mask, rms, activation)


def oracle(arrays, reset, mask, rms=None, activation="gelu"):
  return call(reference.causal_hypermixing, arrays, reset, mask, rms, activation)


def call(operator, arrays, reset, mask, rms, activation):
  *tokens, scale, state = arrays
  return operator(
    *tokens, scale=scale, rms=rms, activation=activation, state=state, reset=reset, mask=mask
  )


def numbers(seed, t):
  """w1, w2, v, log_decay, scale and state, exact in bfloat16."""
  rng = np.random.default_rng(seed)
  shapes = ((B, t, H, K), (B, t, H, K), (B, t, H, V), (H,), (B, t, H), (B, H, K, V))
  arrays = [rng.normal(size=shape) for shape in shapes]
  arrays[3] = -np.abs(arrays[3])
  return tuple(a.astype(jnp.bfloat16).astype(np.float64) for a in arrays)


@st.composite
def tokens(draw):
  t = draw(st.sampled_from((1, 4, 7)))
  return draw(st.integers(0, 999)), t, draw(resets(B, t)), draw(masks(B, t))


@every_form
@pytest.mark.parametrize(
  ("activation", "rms"), [("relu", None), ("gelu", None), ("gelu", "row"), ("gelu", "head")]
)
@given(drawn=tokens())
def test_every_form_is_the_oracle(form, activation, rms, drawn):
  seed, t, reset, mask = drawn
  arrays = numbers(seed, t)
  expected = oracle(arrays, reset, mask, rms, activation)
  with jax.enable_x64():
    y, state = mix(arrays, reset, mask, form, rms, activation)
  assert error((y[mask], state), (expected[0][mask], expected[1])) <= EXACT


@every_form
@given(drawn=tokens())
def test_narrow_inputs_are_summed_in_float32(form, drawn):
  """Numbers exact in bfloat16: nothing is rounded to it but the output."""
  seed, t, reset, mask = drawn
  arrays = numbers(seed, t)
  narrow = [jnp.asarray(a, jnp.bfloat16) for a in arrays[:3]]
  y, state = mix((*narrow, *(np.float32(a) for a in arrays[3:])), reset, mask, form)
  assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  expected = oracle(arrays, reset, mask)
  # A sum of `t` products and of `t` decays, each to half an ulp, and one rounding of the output.
  assert error(state, expected[1]) <= 4 * t * float(jnp.finfo(jnp.float32).eps)
  assert error(y[mask], expected[0][mask]) <= float(jnp.finfo(jnp.bfloat16).eps)


@every_form
@pytest.mark.parametrize("name", ["none", "mean", "sqrt", "decay", "decayvar", "rms"])
def test_derived_outputs_states_and_gradients(name, form):
  arrays = dict(np.load(Path(__file__).parent / "data/hypermixing_causal.npz"))
  w1, w2, v, cot = (arrays[f"in/{key}"].swapaxes(1, 2) for key in ("w1", "w2", "v", "cot"))
  b, t, h, _ = w1.shape
  position = np.broadcast_to(np.arange(t, dtype=np.uint32), (b, t))
  log_decay = np.log(arrays["in/lam"]) if "decay" in name else np.zeros(h)
  with jax.enable_x64():
    scale = {
      "none": None,
      "rms": None,
      "mean": 1 / kernels.decayed_count(position, log_decay),
      "decay": 1 / kernels.decayed_count(position, log_decay),
      "sqrt": kernels.decayed_count(position, 2 * log_decay) ** -0.5,
      "decayvar": kernels.decayed_count(position, 2 * log_decay) ** -0.5,
    }[name]

    def f(w1, w2, v):
      arrays = (w1, w2, v, log_decay, scale, None)
      return mix(arrays, None, None, form, "row" if name == "rms" else None)

    (y, state), backward = jax.vjp(f, *map(jnp.asarray, (w1, w2, v)))
    gradients = backward((jnp.asarray(cot), jnp.zeros_like(state)))
  assert error(y.swapaxes(1, 2), arrays[f"{name}/out"]) <= EXACT
  assert error(state, arrays[f"{name}/final_state"]) <= EXACT
  for key, gradient in zip(("w1", "w2", "v"), gradients, strict=True):
    assert error(gradient.swapaxes(1, 2), arrays[f"{name}/grad/{key}"]) <= EXACT, key


@every_rms
def test_gradients_are_those_of_the_recurrent_form(rms):
  rng, arrays = np.random.default_rng(0), numbers(0, 7)
  reset, mask = rng.random((B, 7)) < 0.3, rng.random((B, 7)) < 0.7
  with jax.enable_x64():
    outputs = {}
    for form in FORMS:
      (y, state), backward = jax.vjp(
        lambda *a, form=form: mix(a, reset, mask, form, rms), *map(jnp.asarray, arrays)
      )
      outputs[form] = backward((jnp.cos(jnp.arange(y.size)).reshape(y.shape), jnp.ones_like(state)))
  for form in ("parallel", "chunkwise"):
    for got, expected in zip(outputs[form], outputs["recurrent"], strict=True):
      assert error(got, expected) <= EXACT


@every_form
def test_masked_tokens_and_a_state_before_a_reset_may_be_nan(form):
  arrays = list(numbers(0, 7))
  mask = np.ones((B, 7), bool)
  mask[:, 2] = False
  expected = mix(tuple(arrays), None, mask, form)
  for i in range(3):
    arrays[i] = arrays[i].copy()
    arrays[i][:, 2] = np.nan
  for got, clean in zip(mix(tuple(arrays), None, mask, form), expected, strict=True):
    np.testing.assert_array_equal(got, clean)
  reset = np.zeros((B, 7), bool)
  reset[:, 0] = True
  healed = mix((*arrays[:5], np.full_like(arrays[5], np.nan)), reset, mask, form)
  assert all(np.isfinite(a).all() for a in healed)


def test_the_chunkwise_form_keeps_states_between_chunks_alone():
  """What the gradient closes over: the states of 64 tokens would be 64 x 16 x 32 numbers."""
  t, k, v = 64, 16, 32
  shapes = ((1, t, 1, k), (1, t, 1, k), (1, t, 1, v))

  def kept(form):
    def residuals(w1, w2, v):
      f = functools.partial(kernels.causal_hypermixing, form=form, chunk_size=16)
      return jax.tree.leaves(jax.vjp(f, w1, w2, v)[1])

    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return sum(a.size for a in jax.eval_shape(residuals, *specs))

  between = t // 16 * k * v + 3 * t * (2 * k + v)
  assert kept("chunkwise") <= between < t * k * v <= kept("parallel")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"w2": (2, 7, 3, 5)}, r"w2 has shape \[2, 7, 3, 5\], expected \[2, 7, 3, 4\]"),
    ({"v": (2, 7, 15)}, r"v has shape \[2, 7, 15\], expected \[batch, time, heads, size\]"),
    ({"scale": (2, 3)}, r"scale has shape \[2, 3\], expected \[3\] or \[2, 7, 3\]"),
    ({"state": (2, 3, 5, 4)}, r"state has shape \[2, 3, 5, 4\], expected \[2, 3, 4, 5\]"),
    ({"log_decay": (2,)}, r"log_decay has shape \[2\], expected \[3\]"),
    ({"form": "serial"}, "form is 'serial', expected one of parallel, chunkwise, recurrent"),
    ({"activation": "tanh"}, "activation is 'tanh', expected one of gelu, relu"),
    ({"rms": "matrix"}, "rms is 'matrix', expected row, head or None"),
    ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
  ],
)
def test_bad_arguments_are_told(change, message):
  shapes = {"w1": (2, 7, 3, 4), "w2": (2, 7, 3, 4), "v": (2, 7, 3, 5), **change}
  arguments = {k: np.zeros(s) if isinstance(s, tuple) else s for k, s in shapes.items()}
  with pytest.raises(ValueError, match=message):
    kernels.causal_hypermixing(**arguments)


@given(position=st.integers(0, 2**32 - 1), angle=st.floats(1e-6, 1.0), quarter=st.integers(0, 3))
def test_sinusoids_are_of_exact_phases(position, angle, quarter):
  step = round(angle / (2 * np.pi) * 2**64)
  turns = position * step % 2**64 + quarter * 2**62
  expected = np.sin(2 * np.pi * (turns % 2**64) / 2**64)
  at = np.full((1, 1), position, np.uint32)
  for x64, dtype in ((False, np.float32), (True, np.float64)):
    with jax.enable_x64(x64):
      got = kernels.sinusoid(at, np.array([angle]), np.array([quarter]), jnp.dtype(dtype))
    # Half an ulp of a phase of up to half a turn, and one of the sine.
    assert abs(float(got[0, 0, 0]) - expected) <= (np.pi + 1) * np.finfo(dtype).eps
