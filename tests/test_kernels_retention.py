"""The bare kernels against float64 NumPy and against exact integers."""

import functools
from pathlib import Path

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from laws_cases import flags, masks, resets
from laws_errors import EXACT, error, intermediates, largest

from triform import kernels
from triform.kernels import FORMS
from triform.kernels.retention import reference

CHUNK = 4
B, K, V = 2, 4, 3
HEADS = {"[h]": (4, 2), "[b, t, h]": (3, 1)}  # query heads, key/value heads, by kind of decay
EPS = {dtype: float(jnp.finfo(dtype).eps) for dtype in ("bfloat16", "float32")}


@functools.partial(jax.jit, static_argnames="form")
def retention(q, k, v, log_decay, state, reset, mask, form):
  return kernels.retention(
    q, k, v, log_decay, state=state, reset=reset, mask=mask, form=form, chunk_size=CHUNK
  )


@functools.partial(jax.jit, static_argnames="form")
def gradients(arrays, cotangents, reset, mask, form):
  def loss(arrays):
    out = retention.__wrapped__(*arrays, reset, mask, form)
    return sum(jnp.vdot(a, b) for a, b in zip(out, cotangents, strict=True))

  return jax.grad(loss)(arrays)


def numbers(seed, t, decay, strength=0.3):
  """q, k, v, log_decay and state, exact in bfloat16."""
  rng = np.random.default_rng(seed)
  h, g = HEADS[decay]
  shapes = [(B, t, h, K), (B, t, g, K), (B, t, g, V), (h,) if decay == "[h]" else (B, t, h)]
  arrays = [rng.normal(size=s) for s in (*shapes, (B, h, K, V))]
  arrays[3] = -strength * np.abs(arrays[3])
  return tuple(a.astype(jnp.bfloat16).astype(np.float64) for a in arrays)


@st.composite
def tokens(draw, lengths=(1, 4, 7)):
  t = draw(st.sampled_from(lengths))
  return draw(st.integers(0, 999)), t, draw(resets(B, t)), draw(masks(B, t))


every_form = pytest.mark.parametrize("form", FORMS)
every_decay = pytest.mark.parametrize("decay", HEADS)


@every_form
@every_decay
@given(tokens())
def test_equals_the_oracle(form, decay, case):
  seed, t, reset, mask = case
  *arrays, state = numbers(seed, t, decay)
  with jax.enable_x64():
    got = retention(*arrays, state, reset, mask, form)
  expected = reference.retention(*arrays, state=state, reset=reset, mask=mask)
  assert error(got[0][mask], expected[0][mask]) <= EXACT
  assert error(got[1], expected[1]) <= EXACT


@every_form
@every_decay
@pytest.mark.parametrize("dtype", EPS)
@given(tokens(lengths=(7,)))
def test_equals_the_oracle_in_a_narrow_dtype(form, decay, dtype, case):
  seed, t, reset, mask = case
  *arrays, log_decay, state = numbers(seed, t, decay)
  narrow = [a.astype(dtype) for a in arrays] + [np.float32(log_decay), np.float32(state)]
  expected = reference.retention(*arrays, log_decay, state=state, reset=reset, mask=mask)
  out, after = retention(*narrow, reset, mask, form)
  simplest, _ = retention(*narrow, reset, mask, "recurrent")
  assert out.dtype == dtype and after.dtype == jnp.float32
  truth = expected[0][mask]
  assert error(out[mask], truth) <= 2 * error(simplest[mask], truth) + 4 * EPS[dtype]
  # The inputs are exact in bfloat16 and the state is a float32 sum, whatever their dtype. Of a
  # sum of t + 1 terms, each a product of three roundings, the rounding is below (t + 3) / 2 ulp.
  assert error(after, expected[1]) <= (t + 3) / 2 * EPS["float32"]


@every_form
@every_decay
@given(tokens())
def test_gradients_are_the_oracles(form, decay, case):
  """Of all five inputs: those of the recurrent form, which central differences confirm."""
  seed, t, reset, mask = case
  rng, arrays = np.random.default_rng(seed + 1), numbers(seed, t, decay)
  out, after = reference.retention(*arrays[:4], state=arrays[4], reset=reset, mask=mask)
  cotangents = (rng.normal(size=out.shape) * mask[..., None, None], rng.normal(size=after.shape))
  with jax.enable_x64():
    got = gradients(arrays, cotangents, reset, mask, form)
    recurrent = gradients(arrays, cotangents, reset, mask, "recurrent")
  for name, one, other in zip(("q", "k", "v", "log_decay", "state"), got, recurrent, strict=True):
    assert error(one, other) <= EXACT, name

  def loss(arrays):
    out = reference.retention(*arrays[:4], state=arrays[4], reset=reset, mask=mask)
    return sum(np.vdot(a, b) for a, b in zip(out, cotangents, strict=True))

  for i, array in enumerate(arrays):
    # Balances the rounding 2**-53 / h of a difference with its truncation h**2.
    direction, h = rng.normal(size=array.shape), 2.0**-17
    moved = [loss([*arrays[:i], array + s * direction, *arrays[i + 1 :]]) for s in (h, -h)]
    slope, norm = (moved[0] - moved[1]) / (2 * h), np.linalg.norm(direction)
    assert abs(slope - np.vdot(got[i], direction)) <= 1e-7 * norm * (1 + np.linalg.norm(got[i]))


@every_form
@given(tokens())
def test_absent_arguments_are_defaults(form, case):
  seed, t, _, _ = case
  *arrays, state = numbers(seed, t, "[h]")
  nothing = np.zeros((B, t), bool)
  with jax.enable_x64():
    got = retention(*arrays, None, None, None, form)
    expected = retention(*arrays, 0 * state, nothing, ~nothing, form)
  chex.assert_trees_all_close(got, expected, rtol=0, atol=EXACT)


@every_form
@every_decay
def test_strong_decays_stay_finite(form, decay):
  """`exp(A_i - A_j)` overflows for a later j, which must be masked before the exponential."""
  arrays = [np.float32(a) for a in numbers(0, 7, decay, strength=100.0)]
  nothing = np.zeros((B, 7), bool)
  ones = (np.ones((B, 7, HEADS[decay][0], V), np.float32), np.ones_like(arrays[4]))
  got = gradients(tuple(arrays), ones, nothing, ~nothing, form)
  expected = gradients(tuple(arrays), ones, nothing, ~nothing, "recurrent")
  for one, other in zip(got, expected, strict=True):
    assert np.all(np.isfinite(one)) and error(one, other) <= 16 * EPS["float32"]


@every_form
@every_decay
def test_masked_tokens_may_be_nan(form, decay):
  *arrays, state = map(np.float32, numbers(0, 7, decay))
  mask = np.array([[True, False, True, True, False, True, False], [False] * 7])
  reset = np.zeros((B, 7), bool)
  junk = [a.copy() for a in arrays]
  for array in junk[:3] + (junk[3:] if decay == "[b, t, h]" else []):
    array[~mask] = np.nan
  cotangents = (np.ones((B, 7, HEADS[decay][0], V), np.float32), np.ones_like(state))
  for f in (
    lambda *a: retention(*a, state, reset, mask, form),
    lambda *a: gradients((*a, state), cotangents, reset, mask, form),
  ):
    got, expected = f(*junk), f(*arrays)
    assert all(np.all(np.isfinite(a)) for a in got)
    for one, other in zip(got[1:], expected[1:], strict=True):
      np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(got[0][mask], expected[0][mask])


@every_form
@every_decay
@pytest.mark.parametrize("at", [0, 2, 4, 6])
def test_a_reset_heals_a_state(form, decay, at):
  """Of its own row, from its token on."""
  *arrays, state = map(np.float32, numbers(0, 7, decay))
  state[0] = np.nan
  reset = np.zeros((B, 7), bool)
  reset[0, at] = True
  out, after = retention(*arrays, state, reset, None, form)
  clean, clean_after = retention(*arrays, 0 * numbers(0, 7, decay)[4], reset, None, form)
  assert np.all(np.isnan(out[0, :at]))
  assert np.all(np.isfinite(after)) and np.all(np.isfinite(out[1]))
  chex.assert_trees_all_close((out[0, at:], after[0]), (clean[0, at:], clean_after[0]), rtol=1e-5)


@every_form
def test_takes_numpy_eagerly(form):
  *arrays, state = numbers(0, 7, "[h]")
  expected = reference.retention(*arrays, state=state)
  with jax.enable_x64():
    got = kernels.retention(*arrays, state=state, form=form, chunk_size=CHUNK)
  assert got[0].dtype == np.float64 and error(got, expected) <= EXACT
  got = kernels.retention(*map(np.float32, arrays), form=form, chunk_size=CHUNK)
  assert got[0].dtype == np.float32


@every_form
def test_rejects_what_does_not_fit(form):
  q, k, v, log_decay, state = numbers(0, 4, "[h]")
  for arguments, options in (
    ((q[0], k, v, log_decay), {}),
    ((q, k[:, :3], v, log_decay), {}),
    ((q, k, v[:, :, :1], log_decay), {}),
    ((q, k, v, log_decay[:3]), {}),
    ((q[:, :, :3], k, v, log_decay[:3]), {}),
    ((q[:, :0], k[:, :0], v[:, :0], log_decay), {}),
    ((q, k, v, log_decay), {"state": state[:1]}),
    ((q, k, v, log_decay), {"mask": np.ones((B, 3), bool)}),
    ((q, k, v, log_decay), {"reset": np.ones((B, 3), bool)}),
    ((q, k, v, log_decay), {"chunk_size": 0}),
  ):
    with pytest.raises(ValueError):
      kernels.retention(*arguments, form=form, **options)
  with pytest.raises(ValueError, match="chunkwise"):
    kernels.retention(q, k, v, log_decay, form="linear")


@every_form
def test_traces_once(form):
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def f(*arrays):
    state, reset, mask = arrays[4:]
    return kernels.retention(*arrays[:4], state=state, reset=reset, mask=mask, form=form)

  for seed in range(3):
    rng = np.random.default_rng(seed)
    f(*map(np.float32, numbers(seed, 7, "[h]")), *(rng.random((2, B, 7)) < 0.5))


# The forms are three algorithms


def abstract(t, b=1, h=2, per_token=False):
  shapes = [(b, t, h, 4), (b, t, h, 4), (b, t, h, 6), (b, t, h) if per_token else (h,)]
  return [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]


def calls(form, backward=False):
  f = functools.partial(kernels.retention, form=form, chunk_size=16)
  if not backward:
    return f
  return jax.grad(lambda *a: sum(jnp.sum(x) for x in f(*a)), argnums=(0, 1, 2, 3))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_memory_by_form(backward, per_token):
  t = 1024

  def growth(form):
    return [largest(calls(form, backward), *abstract(n, per_token=per_token)) for n in (t, 2 * t)]

  for form in ("chunkwise", "recurrent"):
    short, long = growth(form)
    assert short < t * t and long <= 2 * short, form
  short, long = growth("parallel")  # so that the measure is known to see a quadratic one
  assert long > 3 * short


def test_recurrent_keeps_one_token():
  """Between inputs and outputs nothing is longer than a state."""
  b, t, h = 1, 1024, 2
  whole = {a.size for a in intermediates(calls("recurrent"), *abstract(t, b, h)) if a.size >= t}
  assert whole <= {b * t * h * 4, b * t * h * 6}  # q and k, v and the outputs, in the scan's order


@every_form
def test_fixed_decay_is_not_widened(form):
  b, t, h = 3, 80, 5  # b t h is the size of nothing else
  found = intermediates(calls(form), *abstract(t, b, h))
  assert not [a for a in found if a.size == b * t * h and jnp.issubdtype(a.dtype, jnp.floating)]
  found = intermediates(calls(form), *abstract(t, b, h, per_token=True))
  assert [a for a in found if a.size == b * t * h]


def test_chunkwise_compiles_to_linear_memory(monkeypatch):
  monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
  from retention_memory import temporary_bytes

  for backward in (False, True):
    short, long = (temporary_bytes("chunkwise", t, backward=backward) for t in (1024, 2048))
    assert 0 < long <= 2.01 * short  # what is rounded up to an alignment is a few bytes
  assert temporary_bytes("parallel", 2048) > 2.5 * temporary_bytes("parallel", 1024)


# Head norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("weighted", [False, True])
@given(seed=st.integers(0, 99), eps=st.sampled_from([1e-6, 1e-2]))
def test_head_norm(dtype, weighted, seed, eps):
  rng = np.random.default_rng(seed)
  o = rng.normal(size=(2, 5, 3, 8)).astype(jnp.bfloat16).astype(np.float64) * 2.0**-6
  position = rng.integers(0, 500, (2, 5)).astype(np.uint32)
  log_decay = np.array([0.0, -(2.0**-9), -(2.0**-3)])  # the first never decays
  weight = np.float32(rng.normal(size=8)) if weighted else None
  for decay in (log_decay, None):
    expected = reference.head_norm(o, position, decay, eps=eps, weight=weight)
    with jax.enable_x64(dtype == "float64"):
      got = kernels.head_norm(o.astype(dtype), position, decay, eps=eps, weight=weight)
    assert got.dtype == dtype
    # Ten or so roundings on the way; in bfloat16 only the result's.
    assert error(got, expected) <= (EXACT if dtype == "float64" else 4 * EPS[dtype])


def test_head_norm_far_from_the_start():
  """The row scale is monotone, and settles at `1 / (1 - decay)`."""
  o = np.ones((1, 4, 1, 2), np.float32)
  position = np.array([[0, 1000, 1_000_000, 2**32 - 1]], np.uint32)
  got = np.asarray(kernels.head_norm(o, position, np.float32([-(2.0**-9)]), eps=1.0))
  scale = np.expm1(-(2.0**-9) * (position.astype(float) + 1)) / np.expm1(-(2.0**-9))
  np.testing.assert_allclose(got[0, :, 0, 0], 1 / np.sqrt(1 + scale[0]), rtol=4 * EPS["float32"])


def test_head_norm_of_zeros_is_zero_with_gradients():
  zeros = jnp.zeros((1, 2, 1, 4))

  def total(o):
    return kernels.head_norm(o, jnp.zeros((1, 2), jnp.uint32), None, eps=1e-6).sum()

  assert total(zeros) == 0 and np.all(np.isfinite(jax.grad(total)(zeros)))


# Positions and rotary phases


@given(st.data())
def test_token_positions(data):
  """Counted token by token; up to and over the wrap at 2**32."""
  t = data.draw(st.sampled_from([1, 7]))
  starts = st.sampled_from([0, 5, 10**6, 2**31, 2**32 - 3])
  start = np.array([data.draw(starts) for _ in range(B)], np.uint32)
  reset, mask = data.draw(st.none() | flags(B, t)), data.draw(st.none() | masks(B, t))
  position, after = kernels.token_positions(
    jnp.asarray(start), *(None if a is None else jnp.asarray(a) for a in (reset, mask)), t
  )
  assert position.dtype == after.dtype == jnp.uint32
  position, after = np.asarray(position), np.asarray(after)
  for row in range(B):
    seen = int(start[row])
    for n in range(t):
      if mask is None or mask[row, n]:
        seen = 0 if reset is not None and reset[row, n] else seen
        assert position[row, n] == seen % 2**32
        seen += 1
    assert after[row] == seen % 2**32


def test_rotary_steps():
  angles = np.array([2 * np.pi, np.pi, 1.0, 1e-4, -1.0])
  steps = kernels.rotary_steps(angles)
  assert steps.dtype == np.uint32
  assert steps.tolist() == [0, 2**31, 683565276, 68357, 2**32 - 683565276]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_rotary_is_exact(positions):
  """Phases are exact integers, and rotations as good as the dtype at any position."""
  steps = kernels.rotary_steps(10000.0 ** (-np.arange(4) / 3))
  position = np.array([positions], np.uint32)
  phase = np.asarray(kernels.rotary_phase(jnp.asarray(position), jnp.asarray(steps)))
  exact = np.array([[[p * int(s) % 2**32 for s in steps] for p in positions]])
  np.testing.assert_array_equal(phase, exact)
  x = np.random.default_rng(0).normal(size=(1, len(positions), 2, 8)).astype(jnp.bfloat16)
  first, second = np.split(x.astype(np.float64), 2, axis=-1)
  turned = (first + 1j * second) * np.exp(2j * np.pi * exact / 2**32)[:, :, None]
  expected = np.concatenate([turned.real, turned.imag], axis=-1)
  for dtype in ("float64", "float32", "bfloat16"):
    with jax.enable_x64(dtype == "float64"):
      got = kernels.rotate(x.astype(dtype), phase)
    assert got.dtype == dtype
    # An angle up to pi is rounded to half an ulp of 4 in float32: 2**-23 rad, an ulp of 1.
    assert error(got, expected) <= (EXACT if dtype == "float64" else 4 * EPS[dtype])
