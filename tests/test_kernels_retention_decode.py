"""Retention of one token at a time: the step, and the prototype that writes the state rarely."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws_cases import masks, resets
from laws_errors import EXACT, error

from triform import kernels
from triform.kernels.retention import reference

B, H, G, K, V = 3, 4, 2, 8, 6
EPS = {dtype: float(jnp.finfo(dtype).eps) for dtype in ("bfloat16", "float32")}
every_decay = pytest.mark.parametrize("decay", ["[h]", "[b, t, h]"])


@pytest.fixture(scope="module")
def benchmarks():
  """The folder of the prototype."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    yield


def numbers(seed, t, decay):
  """q, k, v, log_decay and state; exact in bfloat16."""
  rng = np.random.default_rng(seed)
  shapes = [(B, t, H, K), (B, t, G, K), (B, t, G, V), (H,) if decay == "[h]" else (B, t, H)]
  arrays = [rng.normal(size=shape) for shape in (*shapes, (B, H, K, V))]
  arrays[3] = -0.3 * np.abs(arrays[3])
  return [a.astype(jnp.bfloat16).astype(np.float64) for a in arrays]


@jax.jit
def step(q, k, v, log_decay, state, reset, mask):
  return kernels.retention(
    q, k, v, log_decay, state=state, reset=reset, mask=mask, form="recurrent"
  )


def bits(a):
  return np.asarray(a).view(np.uint32)


@every_decay
@given(st.integers(0, 999), resets(B, 1), masks(B, 1))
def test_a_step_equals_the_oracle(decay, seed, reset, mask):
  arrays = numbers(seed, 1, decay)
  out, after = reference.retention(*arrays[:4], state=arrays[4], reset=reset, mask=mask)
  with jax.enable_x64():
    got, got_after = step(*arrays, reset, mask)
  assert error(got[mask], out[mask]) <= EXACT and error(got_after, after) <= EXACT
  narrow = [a.astype(jnp.bfloat16) for a in arrays[:3]] + [np.float32(a) for a in arrays[3:]]
  got, got_after = step(*narrow, reset, mask)
  assert got.dtype == jnp.bfloat16 and got_after.dtype == jnp.float32
  # Half a unit each: of an exponential that is off by one, its product, k v^T and their sum.
  assert error(got_after, after) <= 2.5 * EPS["float32"]
  # Of the sum, K + 4 roundings of its absolute terms; then one to bfloat16.
  terms, _ = reference.retention(
    *(np.abs(a) for a in arrays[:3]), arrays[3], state=np.abs(arrays[4]), reset=reset, mask=mask
  )
  rounding = (K + 4) / 2 * EPS["float32"] * np.linalg.norm(terms[mask])
  allowed = EPS["bfloat16"] / 2 + rounding / (np.linalg.norm(out[mask]) or 1.0)
  assert error(got[mask], out[mask]) <= allowed


@every_decay
def test_a_reset_forgets_and_padding_keeps_whatever_the_state_holds(decay):
  *heads, log_decay, state = (np.float32(a) for a in numbers(0, 1, decay))
  state[:2], state[2, 0, 0, :2] = np.nan, (-0.0, np.inf)
  reset, mask = np.array([[True], [True], [False]]), np.array([[True], [False], [False]])
  out, after = step(*heads, log_decay, state, reset, mask)
  fresh, fresh_after = step(*heads, log_decay, 0 * numbers(0, 1, decay)[4], reset, mask)
  np.testing.assert_array_equal(out[0], fresh[0])
  np.testing.assert_array_equal(after[0], fresh_after[0])
  np.testing.assert_array_equal(bits(after[1:]), bits(state[1:]))


def replayed(window, arrays, reset, mask):
  """Outputs, and the state after every whole window."""
  *heads, log_decay, state = arrays
  one = jax.jit(kernels.retention_step, static_argnames="write")
  replay = kernels.new_replay(jnp.asarray(state), window, G, heads[1].dtype)
  outputs, states = [], []
  for token in range(heads[0].shape[1]):
    at = slice(token, token + 1)
    n = token % window
    own = log_decay if log_decay.ndim == 1 else log_decay[:, at]
    flags = {"reset": reset[:, at], "mask": mask[:, at], "write": n == window - 1}
    out, replay = one(n, *(a[:, at] for a in heads), own, replay, **flags)
    outputs.append(out)
    if n == window - 1:
      states.append(replay.state)
  return np.concatenate(outputs, axis=1), states


@every_decay
@pytest.mark.parametrize("window", [1, 3])
@given(st.integers(0, 999), resets(B, 7), masks(B, 7))
def test_replay_equals_the_oracle(decay, window, seed, reset, mask):
  arrays = numbers(seed, 7, decay)
  with jax.enable_x64():
    got, states = replayed(window, arrays, reset, mask)
  heads, state = arrays[:3], arrays[4]
  for n, one in enumerate(states):
    past = slice((n + 1) * window)
    log_decay = arrays[3] if arrays[3].ndim == 1 else arrays[3][:, past]
    out, after = reference.retention(
      *(a[:, past] for a in heads), log_decay, state=state, reset=reset[:, past], mask=mask[:, past]
    )
    assert error(one, after) <= EXACT
    assert error(got[:, past][mask[:, past]], out[mask[:, past]]) <= EXACT


def test_replay_forgets_and_keeps_as_the_step_does():
  arrays = [np.float32(a) for a in numbers(0, 8, "[h]")]
  state = arrays[4]
  state[0] = arrays[1][1, 1] = arrays[2][1, 2] = np.nan  # a state, a key and a value
  state[2, 0, 0, :2] = -0.0, np.nan
  reset, mask = np.zeros((B, 8), bool), np.ones((B, 8), bool)
  reset[0, 1] = reset[1, 3] = True
  mask[2] = False
  out, (_, after) = replayed(4, arrays, reset, mask)
  assert np.isfinite(out[0, 1:]).all() and np.isfinite(out[1, 3:]).all()
  assert np.isfinite(after[:2]).all()
  np.testing.assert_array_equal(bits(after[2]), bits(state[2]))


@pytest.mark.parametrize(
  ("changed", "told"),
  [
    ({"k": (B, 1, G + 1, K)}, r"k has shape .*expected \[3, 1, .* for a state"),
    ({"q": (B, 2, H, K)}, "q has shape"),
    ({"log_decay": (H + 1,)}, "log_decay has shape"),
  ],
)
def test_replay_names_what_does_not_fit(changed, told):
  *heads, log_decay, state = numbers(0, 1, "[h]")
  arrays = dict(zip("qkv", heads, strict=True)) | {"log_decay": log_decay}
  arrays |= {name: np.zeros(shape) for name, shape in changed.items()}
  replay = kernels.new_replay(state, 2, G, "float32")
  with pytest.raises(ValueError, match=told):
    kernels.retention_step(0, *arrays.values(), replay, write=False)
  with pytest.raises(ValueError, match="window is 0, expected at least 1"):
    kernels.new_replay(state, 0, G, "float32")


def test_bytes_are_counted_as_a_device_moves_them(benchmarks):
  from hlo_bytes import moved, moves

  a, row = jnp.ones((64, 256)), jnp.ones((1, 256))

  def program(f, *args):
    return jax.jit(f, donate_argnums=0).lower(*args).compile().as_text()

  assert moved(program(lambda a: a * 2, a)) == 2 * a.nbytes
  placed = program(lambda a, row: jax.lax.dynamic_update_slice(a, row, (3, 0)), a, row)
  assert 2 * row.nbytes <= moved(placed) <= 2 * row.nbytes + 16  # and where

  def update_then_read(a):
    a = jax.lax.optimization_barrier(a * 2)
    return a, a.sum(axis=0)

  assert moves(program(update_then_read, a), a.size) == 3
  on_chip = placed_in_vmem(program(functools.partial(jnp.multiply, 2), a))
  assert moved(on_chip) == a.nbytes


def placed_in_vmem(text):
  """The result of a program of one instruction, as a TPU's compiler says that it is there."""
  (root,) = [line for line in text.splitlines() if "ROOT" in line and " fusion(" in line]
  return text.replace(root, root.replace("{1,0}", "{1,0:T(8,128)S(1)}", 1))
