"""The float32 kernel of retention on GPUs, interpreted: results and gradients against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws_errors import error
from retention_errors import B, as_called, compare, numbers, plain, with_gradients

from triform.kernels.retention import gpu

kernel = functools.partial(as_called, gpu.chunkwise)


@pytest.mark.parametrize("decay", [pytest.param("[h]", marks=pytest.mark.slow), "[b, t, h]"])
@given(st.integers(0, 999), st.sampled_from([0.0, 0.01, 0.3]), st.sampled_from([0.0, 0.1, 0.9]))
def test_packed_and_padded_rows_equal_the_oracle(decay, seed, starts, holes):
  t = 150  # no multiple of a chunk
  rng = np.random.default_rng(seed)
  reset, mask = rng.random((B, t)) < starts, rng.random((B, t)) >= holes
  compare(kernel, numbers(seed, t, decay, 2, 1, 64, 64), reset, mask, by_differences=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("t", "h", "g", "k", "v", "decay"),
  [
    (64, 1, 1, 64, 128, "[h]"),
    (1024, 1, 1, 64, 64, "[b, t, h]"),  # in pieces
    (192, 4, 2, 256, 100, "[h]"),  # shared keys
    (70, 1, 1, 512, 64, "[h]"),  # narrower tiles
  ],
)
def test_sizes_equal_the_oracle(t, h, g, k, v, decay):
  compare(kernel, numbers(0, t, decay, h, g, k, v), None, None, by_differences=True)


@pytest.mark.slow
def test_a_reset_forgets_a_state_that_is_not_finite():
  *arrays, state = numbers(0, 128, "[h]", 1, 1, 64, 64)
  reset = np.zeros((B, 128), bool)
  reset[:, 0] = reset[:, 100] = True
  ones = (jnp.ones((B, 128, 1, 64)), jnp.ones_like(state))
  finite = with_gradients(kernel, (*arrays, state), ones, reset, None)
  got = with_gradients(kernel, (*arrays, np.full_like(state, np.nan)), ones, reset, None)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(finite), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_strong_decays_stay_finite():
  *arrays, log_decay, state = numbers(0, 128, "[b, t, h]", 1, 1, 64, 64)
  arrays = (*arrays, 1000 * log_decay, state)
  ones = (jnp.ones((B, 128, 1, 64)), jnp.ones_like(state))
  got = jax.tree.leaves(with_gradients(kernel, arrays, ones, None, None))
  expected = jax.tree.leaves(with_gradients(plain, arrays, ones, None, None))
  # Of decays summed up to A every sum, and so every exponent, is that of float32.
  largest = np.abs(np.cumsum(arrays[3], axis=1)).max()
  for one, other in zip(got, expected, strict=True):
    assert np.all(np.isfinite(one)) and error(one, other) <= largest * np.finfo(np.float32).eps
