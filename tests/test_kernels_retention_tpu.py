"""The TPU kernels of retention, interpreted: against float64, and as programs for a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from laws_errors import error
from retention_errors import CHUNK, EPS, B, as_called, compare, numbers, plain, with_gradients

from triform import kernels
from triform.kernels.retention import tpu, xla

kernel = functools.partial(as_called, tpu.chunkwise)


@pytest.mark.parametrize(
  ("dtype", "decay"),
  [
    ("bfloat16", "[h]"),
    ("float32", "[b, t, h]"),
    pytest.param("bfloat16", "[b, t, h]", marks=pytest.mark.slow),
    pytest.param("float32", "[h]", marks=pytest.mark.slow),
  ],
)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.01, 0.3]), st.sampled_from([0.0, 0.1, 0.9]))
def test_packed_and_padded_rows_equal_the_oracle(dtype, decay, seed, starts, holes):
  t = 200  # no multiple of a chunk
  rng = np.random.default_rng(seed)
  reset, mask = rng.random((B, t)) < starts, rng.random((B, t)) >= holes
  compare(kernel, numbers(seed, t, decay, 2, 1, 128, 128, dtype), reset, mask)


@pytest.mark.parametrize(
  ("t", "h", "g", "k", "v", "decay"),
  [
    (128, 1, 1, 64, 96, "[b, t, h]"),  # less than the lanes of a register; one head
    pytest.param(1024, 2, 2, 128, 128, "[h]", marks=pytest.mark.slow),  # blocks of four chunks
    pytest.param(384, 4, 2, 256, 128, "[h]", marks=pytest.mark.slow),  # of one; shared keys
    (130, 1, 1, 100, 428, "[h]"),
  ],
)
def test_sizes_equal_the_oracle(t, h, g, k, v, decay):
  compare(kernel, numbers(0, t, decay, h, g, k, v), None, None)


def test_no_memory_is_read_before_it_is_written():
  """Scratch is NaN at first, and a read or write outside of an array raises."""
  params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
  reset = np.zeros((B, 256), bool)
  reset[0, 7] = reset[1, 130] = True
  compare(kernel, numbers(0, 256, "[h]", 1, 1, 128, 128), reset, None, interpret=params)
  compare(kernel, numbers(0, 256, "[h]", 1, 1, 128, 128), None, None, interpret=params)


def test_a_reset_forgets_a_state_that_is_not_finite():
  *arrays, state = numbers(0, 256, "[h]", 1, 1, 128, 128)
  reset = np.zeros((B, 256), bool)
  reset[:, 0] = reset[:, 200] = True
  ones = (jnp.ones((B, 256, 1, 128)), jnp.ones_like(state))
  finite = with_gradients(kernel, (*arrays, state), ones, reset, None)
  got = with_gradients(kernel, (*arrays, np.full_like(state, np.nan)), ones, reset, None)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(finite), strict=True):
    np.testing.assert_array_equal(one, other)


def test_padding_leaves_the_state_as_it_was():
  *arrays, state = numbers(0, 128, "[h]", 1, 1, 128, 128)
  state[0, 0, 0, 0] = -0.0
  mask = np.zeros((B, 128), bool)
  mask[1, 100:] = True
  _, after = jax.jit(kernel)((*arrays, state), None, mask)
  np.testing.assert_array_equal(np.asarray(after[0]).view(np.int32), state[0].view(np.int32))
  assert not np.array_equal(after[1], state[1])


def test_strong_decays_stay_finite():
  *arrays, log_decay, state = numbers(0, 128, "[b, t, h]", 1, 1, 128, 128)
  arrays = (*arrays, 1000 * log_decay, state)
  ones = (jnp.ones((B, 128, 1, 128)), jnp.ones_like(state))
  got = jax.tree.leaves(with_gradients(kernel, arrays, ones, None, None))
  expected = jax.tree.leaves(with_gradients(plain, arrays, ones, None, None))
  # Of decays summed up to A every sum, and so every exponent, is that of float32.
  largest = np.abs(np.cumsum(arrays[3], axis=1)).max()
  for one, other in zip(got, expected, strict=True):
    assert np.all(np.isfinite(one)) and error(one, other) <= largest * EPS["float32"]


def test_rows_under_vmap_and_rematerialisation_equal_a_batch():
  *arrays, state = numbers(0, 128, "[h]", 1, 1, 128, 128)

  @jax.checkpoint
  def one(q, k, v, log_decay, state):
    out, after = kernel((q[None], k[None], v[None], log_decay, state[None]), None, None)
    return out[0], after[0]

  def loss(f, arrays):
    return sum(jnp.sum(jnp.square(a)) for a in f(*arrays))

  every = jax.vmap(one, in_axes=(0, 0, 0, None, 0))
  got = jax.jit(jax.grad(functools.partial(loss, every)))((*arrays, state))
  batch = functools.partial(loss, lambda *arrays: kernel(arrays, None, None))
  for one_gradient, other in zip(got, jax.jit(jax.grad(batch))((*arrays, state)), strict=True):
    np.testing.assert_allclose(one_gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", ["[h]", "[b, t, h]"])
def test_the_other_gradients_are_the_same_without_that_of_decays(decay):
  """Which are then not computed."""
  q, k, v, log_decay, state = numbers(0, 256, decay, 2, 1, 128, 128)

  def loss(arrays, log_decay):
    *heads, state = arrays
    out, after = kernel((*heads, log_decay, state), None, None)
    return jnp.sum(jnp.square(out)) + jnp.sum(jnp.square(after))

  arrays = (q, k, v, state)
  learned = jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays, log_decay)[0]
  constant = jax.jit(jax.grad(loss))(arrays, log_decay)
  for one, other in zip(constant, learned, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("learned", [True, False])
def test_a_gradient_of_decays_is_computed_where_it_is_asked_for(learned):
  heads = [jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)] * 3

  def loss(log_decay, *heads):
    return jnp.sum(kernels.retention(*heads, log_decay)[0].astype(jnp.float32))

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1) if learned else 1))
  export = jax.export.export(gradient, platforms=["tpu"])
  text = export(jax.ShapeDtypeStruct((2,), jnp.float32), *heads).mlir_module()
  outputs = [launch.count("tensor<") for launch in re.findall(r"@tpu_custom.* -> (.*)", text)]
  assert outputs == [3, 5 if learned else 4]  # out, state, saved; d_q, d_k, d_v, d_state


def exported(platform, t=128, size=128, dtype=jnp.bfloat16, **options):
  """The program of a gradient, as text."""
  heads = [jax.ShapeDtypeStruct((1, t, 2, size), dtype)] * 3

  def loss(q, k, v):
    return jnp.sum(kernels.retention(q, k, v, jnp.zeros(2), **options)[0].astype(jnp.float32))

  return jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(*heads).mlir_module()


@pytest.mark.parametrize(
  ("platform", "options", "kernel_runs"),
  [
    ("tpu", {}, True),
    ("tpu", {"implementation": "tpu"}, True),
    ("tpu", {"implementation": ("tpu", "xla"), "t": 127}, False),
    ("tpu", {"implementation": "xla"}, False),
    ("tpu", {"form": "parallel"}, False),
    ("tpu", {"t": 127}, False),
    ("tpu", {"size": 63}, False),
    ("tpu", {"dtype": jnp.float16}, False),
    ("cpu", {}, False),
  ],
)
def test_which_implementation_is_in_the_program(platform, options, kernel_runs):
  assert ("tpu_custom_call" in exported(platform, **options)) == kernel_runs


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"form": "recurrent"}, "tpu: the form is 'recurrent', expected 'chunkwise'"),
    ({"t": 100}, "tpu: there are 100 tokens, expected at least 128"),
    ({"size": 63}, "tpu: keys and values have size 63 and 63, expected 64 to 512"),
    ({"size": 513}, "tpu: keys and values have size 513 and 513, expected 64 to 512"),
    ({"dtype": jnp.float16}, "tpu: q, k and v are float16, expected"),
  ],
)
def test_an_implementation_that_does_not_fit_says_why(options, told):
  with pytest.raises(NotImplementedError, match=told):
    exported("tpu", implementation="tpu", **options)


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match="implementation is 'cuda', expected one of xla, tpu, gpu"):
    exported("cpu", implementation="cuda")


def test_xla_is_an_implementation_like_any_other():
  *arrays, state = numbers(0, 128, "[h]", 1, 1, 4, 4)
  got = kernels.retention(*arrays, state=state, implementation="xla")
  expected = xla.chunkwise(*arrays, state, None, None, chunk_size=CHUNK)
  for one, other in zip(got, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
