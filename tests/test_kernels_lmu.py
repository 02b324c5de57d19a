"""The Legendre memory: its tables, and every form against float64 NumPy.

`data/lmu.npz`, `table_<order>_<theta>`: the system of the papers, discretised in float64 by SciPy.
"""

import functools
import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from laws_cases import masks, resets
from laws_errors import EXACT, equations, error, intermediates

from triform import kernels
from triform.kernels.lmu import DISCRETIZERS, api, reference
from triform.kernels.lmu.tables import Tables, system

ARRAYS = np.load(Path(__file__).parent / "data/lmu.npz")
TABLES = sorted({name.split("/")[0] for name in ARRAYS.files if name.startswith("table")})
B, D, N, THETA, CHUNK = 2, 3, 5, 24.0, 3  # Euler's method needs a window above 4 n
WAYS = {
  "recurrent": {"form": "recurrent"},
  "chunkwise": {"form": "chunkwise"},
  "gemm": {"form": "parallel", "method": "gemm"},
  "fft": {"form": "parallel", "method": "fft"},
}
OUTPUTS = {"memory": None, "narrow": 2, "wide": 40}  # numbers that are read; folded, if narrow
every_way = pytest.mark.parametrize("way", WAYS)
EPS = float(jnp.finfo(jnp.float32).eps)


@functools.partial(jax.jit, static_argnames=("way", "order", "fixed", "discretizer", "chunk_size"))
def remember(
  u, kernel=None, state=None, reset=None, mask=None, theta=None, *, way, order=N, fixed=THETA,
  discretizer="zoh", chunk_size=CHUNK,
):  # fmt: skip
  """`theta` is learned, `fixed` is not."""
  return kernels.lmu(
    u,
    order=order,
    theta=fixed if theta is None else theta,
    discretizer=discretizer,
    kernel=kernel,
    state=state,
    reset=reset,
    mask=mask,
    chunk_size=chunk_size,
    **WAYS[way],
  )


def oracle(u, kernel=None, state=None, reset=None, mask=None, theta=THETA, discretizer="zoh"):
  return reference.lmu(
    u,
    order=N,
    theta=theta,
    discretizer=discretizer,
    kernel=kernel,
    state=state,
    reset=reset,
    mask=mask,
  )


def numbers(seed, t, outputs="memory"):
  """u, kernel and state, exact in bfloat16."""
  rng, o = np.random.default_rng(seed), OUTPUTS[outputs]
  shapes = ((B, t, D), None if o is None else (D, N, o), (B, D, N))
  return tuple(
    None if shape is None else rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float64)
    for shape in shapes
  )


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_papers(name):
  expected = {k.split("/")[1]: ARRAYS[k] for k in ARRAYS.files if k.startswith(f"{name}/")}
  meta = json.loads(str(expected.pop("meta")))
  order, theta, some = meta["order"], meta["theta"], meta["rows_and_cols"]
  tables = Tables(order, float(theta), "zoh", np.dtype(np.float64))
  abar, bbar = tables.powers(1)[1], tables.impulse_response(1)[0]
  probe = np.cos(0.7 * np.arange(order))
  power = np.linalg.matrix_power(abar, theta)
  got = {
    "Abar": abar,
    "Abar_rows": abar[some],
    "Abar_cols": abar[:, some].T,
    "Abar_diag": np.diag(abar),
    "Abar_probe": abar @ probe,
    "Abar_pow_theta_probe": power @ probe,
    "Bbar": bbar,
  }
  for key, array in expected.items():
    # Rounding of a sum of `order` products, each up to a few times the largest entry.
    np.testing.assert_allclose(got[key], array, atol=1e-12 * np.abs(array).max(), err_msg=key)
  # Nothing grows in the basis in which the polynomials have the same norm.
  scale = np.sqrt(2 * np.arange(order) + 1)
  for whole in (abar, power):
    assert np.linalg.norm(whole * scale / scale[:, None], 2) <= 1 + 1e-12


@pytest.mark.parametrize("discretizer", DISCRETIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("order", "theta"), [(6, 32.0), (32, 784.0)])
def test_learned_tables_are_the_fixed_ones(order, theta, dtype, discretizer):
  count, dtype = 100, np.dtype(dtype)
  fixed = Tables(order, theta, discretizer, np.dtype(np.float64))
  with jax.enable_x64(dtype == np.float64):
    learned = Tables(order, jnp.asarray(theta), discretizer, dtype)
    got = learned.powers(count), learned.impulse_response(count)
  expected = fixed.powers(count), fixed.impulse_response(count)
  for ours, theirs in zip(got, expected, strict=True):
    assert ours.dtype == dtype and ours.shape == theirs.shape
    # Squarings add up: an error of `Abar` is multiplied by the power.
    assert error(ours, theirs) <= count * np.finfo(dtype).eps


def test_theta_is_learned_from_below_a_token_to_long_windows():
  for theta in (0.02, 0.5, 5e4):
    tables = Tables(16, jnp.float32(theta), "zoh", jnp.dtype(jnp.float32))
    expected, _ = reference.discretise(16, theta)
    np.testing.assert_allclose(tables.powers(1)[1], expected, atol=30 * EPS)


@st.composite
def tokens(draw, t):
  """A seed, resets and a mask."""
  return draw(st.integers(0, 999)), draw(resets(B, t)), draw(masks(B, t))


# Documents that begin within chunks and with them, holes, and padding that would begin one.
RESET = np.array([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0]], bool)
MASK = np.array([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)


ORACLE_QUICK = {("memory", "zoh", way) for way in WAYS} | {("memory", "euler", "chunkwise")}
ORACLE_QUICK |= {(outputs, "zoh", way) for outputs in ("narrow", "wide") for way in ("gemm", "fft")}


@pytest.mark.parametrize(
  ("outputs", "discretizer", "way"),
  [
    pytest.param(*case, marks=() if case in ORACLE_QUICK else pytest.mark.slow)
    for case in itertools.product(OUTPUTS, DISCRETIZERS, WAYS)
  ],
)
@given(drawn=tokens(7))
@example(drawn=(0, RESET, MASK))
def test_every_form_is_the_oracle(outputs, discretizer, way, drawn):
  """With and without a state, and without resets."""
  seed, reset, mask = drawn
  u, kernel, state = numbers(seed, 7, outputs)
  for before, begins in ((state, reset), (None, reset), (state, None), (None, None)):
    arrays = (u, kernel, before, begins, mask)
    with jax.enable_x64():
      y, after = remember(*arrays, way=way, discretizer=discretizer)
    expected = oracle(*arrays, discretizer=discretizer)
    assert error((y[mask], after), (expected[0][mask], expected[1])) <= EXACT


@every_way
@pytest.mark.parametrize("outputs", ["memory", "narrow"])
@pytest.mark.parametrize(
  ("t", "chunk_size"),
  [
    (1, 3),
    (5, 1),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in ((11, 4), (6, 9), (300, 7))),
  ],
)
def test_any_length_of_sequences_and_chunks(t, chunk_size, outputs, way):
  u, kernel, state = numbers(0, t, outputs)
  with jax.enable_x64():
    for before in (None, state):
      got = remember(u, kernel, before, way=way, chunk_size=chunk_size)
      assert error(got, oracle(u, kernel, before)) <= EXACT


@every_way
@pytest.mark.parametrize(
  ("outputs", "discretizer", "there"),
  [
    ("narrow", "zoh", True),
    ("narrow", "zoh", False),
    ("narrow", "euler", True),
    pytest.param("narrow", "euler", False, marks=pytest.mark.slow),
    pytest.param("memory", "zoh", True, marks=pytest.mark.slow),
    pytest.param("wide", "zoh", False, marks=pytest.mark.slow),
  ],
)
def test_gradients_are_those_of_the_recurrent_form(there, outputs, discretizer, way):
  """By the inputs, the state, what reads the memory, and theta; folded if nothing is `there`."""
  t, rng = 7, np.random.default_rng(1)
  u, kernel, state = numbers(0, t, outputs)
  mask, reset = rng.random((B, t)) < 0.8, rng.random((B, t)) < 0.3
  by_state = rng.normal(size=(B, D, N))

  def loss(y, after, xp):
    shape = (B, t, 1, 1)[: y.ndim]
    return xp.sum(xp.where(mask.reshape(shape), xp.sin(y), 0)) + xp.sum(by_state * after)

  def f(way, arrays):
    u, kernel, state, theta = arrays
    flags = (reset if there else None, mask)
    return loss(*remember(u, kernel, state, *flags, theta, way=way, discretizer=discretizer), jnp)

  arrays = (u, kernel, state if there else None, np.float64(THETA))
  with jax.enable_x64():
    arrays = jax.tree.map(jnp.asarray, arrays)
    got, expected = (jax.grad(functools.partial(f, way))(arrays) for way in (way, "recurrent"))
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert error(ours, theirs) <= EXACT

  def at(theta):
    flags = {"reset": reset if there else None, "mask": mask}
    return loss(*oracle(*arrays[:3], **flags, theta=theta, discretizer=discretizer), np)

  # Central differences, twice: off by the fourth power of h / theta, and by rounding over h.
  h = 1e-3 * THETA
  one, two = ((at(THETA + step) - at(THETA - step)) / (2 * step) for step in (h, 2 * h))
  assert float(got[3]) == pytest.approx((4 * one - two) / 3, rel=1e-9)


@every_way
def test_gradients_are_the_adjoint_system(way):
  """`l_t = g_t + Abar^T l_{t+1}`; by theta `-1 / theta sum_t l_t^T A (m_t - e0 u_t)`."""
  t, rng = 9, np.random.default_rng(2)
  u, _, state = numbers(2, t)
  cotangent = rng.normal(size=(B, t, D, N))
  m, _ = oracle(u, None, state)
  abar, bbar = reference.discretise(N, THETA)
  adjoint, after = np.zeros((B, t, D, N)), np.zeros((B, D, N))
  for i in reversed(range(t)):
    adjoint[:, i] = cotangent[:, i] + after @ abar
    after = adjoint[:, i]
  held = m - u[..., None] * np.eye(N)[0]
  expected = (
    adjoint @ bbar,
    adjoint[:, 0] @ abar,
    -np.einsum("btdn,nm,btdm->", adjoint, system(N)[0] / THETA, held) / THETA,
  )
  with jax.enable_x64():
    _, backward = jax.vjp(
      lambda u, state, theta: remember(u, None, state, theta=theta, way=way)[0],
      *map(jnp.asarray, (u, state, THETA)),
    )
    got = backward(jnp.asarray(cotangent))
  for ours, theirs in zip(got, expected, strict=True):
    assert error(ours, theirs) <= EXACT


@pytest.mark.parametrize(
  ("order", "theta", "t", "allowed"),
  [
    # Twice what NumPy reaches in float32. The recurrent form is the one whose errors add up; those
    # of its products of 256 terms are twice as large again where they are summed one by one.
    (256, 128.0, 128, {"recurrent": 2.4e-6, "chunkwise": 5e-7, "gemm": 5e-7, "fft": 4e-7}),
    (32, 784.0, 784, {"recurrent": 5.4e-6, "chunkwise": 5e-7, "gemm": 5e-7, "fft": 4e-7}),
  ],
)
def test_float32_is_as_exact_as_it_can_be(order, theta, t, allowed):
  u = np.random.default_rng(0).normal(size=(2, t, 2)).astype(np.float32)
  expected, _ = reference.lmu(u, order=order, theta=theta)
  for way, most in allowed.items():
    m, _ = kernels.lmu(u, order=order, theta=theta, chunk_size=32, **WAYS[way])
    assert error(m, expected) <= most, way


def products(f, *arguments):
  return [e for e in equations(f, *arguments) if e.primitive.name == "dot_general"]


@every_way
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_tables_are_never_multiplied_in_bfloat16(outputs, learned, way):
  """Nor their gradients: in it, `Abar` would remember several times too long."""
  o = OUTPUTS[outputs]
  u = spec(B, 7, D, dtype=jnp.bfloat16)
  kernel = None if o is None else spec(D, N, o, dtype=jnp.bfloat16)
  theta = spec() if learned else None

  def f(u, kernel, theta):
    y, after = remember(u, kernel, theta=theta, way=way)
    assert y.dtype == (jnp.float32 if kernel is None else jnp.bfloat16)
    assert after.dtype == jnp.float32
    return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(after)

  def is_narrow(array):
    return array.aval.dtype == jnp.bfloat16

  for g in (f, jax.grad(f, argnums=(0, 2) if learned else 0)):
    for product in products(g, u, kernel, theta):
      if any(map(is_narrow, product.invars)):  # of what is read, kernel and memory alone
        assert all(map(is_narrow, product.invars)) and kernel is not None
        assert o in {size for array in product.invars for size in array.aval.shape}
      else:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@every_way
@pytest.mark.parametrize("outputs", ["memory", "narrow"])
def test_masked_tokens_and_what_is_before_a_reset_may_be_nan(outputs, way):
  t = 7
  u, kernel, state = numbers(3, t, outputs)
  mask, reset = np.ones((B, t), bool), np.zeros((B, t), bool)
  mask[:, 2], reset[:, 4] = False, True
  broken, cleared = u.copy(), state.copy()
  broken[:, 2], cleared[:] = np.nan, np.nan
  for flags in ((None, mask), (reset, mask)):
    expected = remember(u, kernel, state, *flags, way=way)
    for got, clean in zip(remember(broken, kernel, state, *flags, way=way), expected, strict=True):
      np.testing.assert_array_equal(got, clean)
  broken[:, :4] = np.nan
  expected, got = (
    remember(a, kernel, m, reset, way=way) for a, m in ((u, state), (broken, cleared))
  )
  np.testing.assert_array_equal(got[0][:, 4:], expected[0][:, 4:])
  np.testing.assert_array_equal(got[1], expected[1])


@every_way
def test_a_masked_call_leaves_the_state_bit_for_bit(way):
  u, _, state = numbers(4, 7)
  state[0], state[1, :, 0] = -0.0, 1e30
  state, nothing = np.float32(state), np.zeros((B, 7), bool)
  y, after = remember(np.full_like(u, np.nan), None, state, ~nothing, nothing, way=way)
  np.testing.assert_array_equal(np.asarray(after).view(np.int32), state.view(np.int32))
  assert np.isfinite(y).all()
  y, after = remember(u, None, None, None, nothing, way=way)
  assert not after.any() and np.isfinite(y).all()


@every_way
@pytest.mark.parametrize("outputs", ["memory", "narrow"])
def test_no_output_depends_on_a_later_input(outputs, way):
  """By FFT it does, by rounding: the rows of a batch and the channels of a row never meet."""
  t, large = 50, 1e4
  u, kernel, _ = numbers(5, t, outputs)
  before, _ = remember(u, kernel, way=way)
  later = u.copy()
  later[0, 40:] = large
  after, _ = remember(later, kernel, way=way)
  np.testing.assert_array_equal(after[1], before[1])
  leak = np.abs(after[0, :40] - before[0, :40]).max()
  assert leak <= (1e-6 * large if way == "fft" else 0)


def primitives(**arguments):
  """The names in the program of a call; numbers are shapes of arrays."""

  def f(u, kernel=None, state=None, reset=None, mask=None):
    options = {name: a for name, a in arguments.items() if not isinstance(a, tuple)}
    return kernels.lmu(
      u, order=N, theta=THETA, kernel=kernel, state=state, reset=reset, mask=mask, **options
    )

  specs = {
    name: spec(*a, dtype=bool if name in ("reset", "mask") else jnp.float32)
    for name, a in arguments.items()
    if isinstance(a, tuple)
  }
  return {e.primitive.name for e in equations(lambda specs: f(**specs), specs)}


def test_which_method_runs_where(monkeypatch):
  assert api.FFT_FROM["cpu"] == 256
  for t, state in ((255, None), (256, None), (256, (1, D, N))):
    call = {"u": (1, t, D), "form": "parallel"}
    if state is not None:
      call["state"] = state
    assert ("fft" in primitives(**call)) == (t == 256)
    assert ("fft" in primitives(**call, mask=(1, t))) == (t == 256)
    assert "fft" not in primitives(**call, reset=(1, t))
    assert "fft" not in primitives(**call, reset=(1, t), method="fft")
    assert "fft" not in primitives(**call, method="gemm")
    assert "fft" in primitives(**call, method="fft")
    for form in ("chunkwise", "recurrent"):
      assert "fft" not in primitives(**{**call, "form": form})
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  for t in (2047, 2048):
    assert ("fft" in primitives(u=(1, t, D), form="parallel")) == (t == 2048)


def test_the_forms_are_three_algorithms():
  """No products of all pairs but in the parallel form, and no scan in it."""
  t, c = 64, 8

  def sizes(form):
    f = functools.partial(kernels.lmu, order=N, theta=THETA, form=form, chunk_size=c)
    return [a.size for a in intermediates(f, spec(1, t, 1)) if a.ndim]

  # Copies of a row in which every token meets every other are twice as long as it.
  assert max(sizes("recurrent")) <= t * N
  assert max(sizes("chunkwise")) <= 2 * t * (c + 1) + t * N < t * t
  assert max(sizes("parallel")) >= t * t
  assert "scan" not in primitives(u=(1, t, D), form="parallel")
  assert "scan" not in primitives(u=(1, 256, D), form="parallel")


@pytest.mark.parametrize("way", ["gemm", "fft"])
def test_a_folded_reading_makes_no_memory(way):
  b, t, d, n = 1, 17, 3, 11

  def makes_memory(o, **flags):
    f = functools.partial(kernels.lmu, order=n, theta=THETA, **WAYS[way])
    arrays = (spec(b, t, d), spec(d, n, o))
    found = intermediates(lambda u, kernel: f(u, kernel=kernel, **flags), *arrays)
    return any({b, t, d, n} <= set(a.shape) for a in found)

  assert not makes_memory(2)
  assert not makes_memory(2, mask=np.arange(t)[None] < 9)
  assert makes_memory(2, state=np.zeros((b, d, n), np.float32))
  assert makes_memory(40)  # less work to read after


def test_a_final_memory_alone_takes_no_fft():
  def program(part):
    def f(u, kernel):
      return kernels.lmu(u, order=N, theta=THETA, kernel=kernel, **WAYS["fft"])[part]

    return jax.jit(f).lower(spec(1, 64, D), spec(D, N, 2)).as_text()

  assert "fft" in program(0)
  assert "fft" not in program(1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"u": (2, 7)}, r"u has shape \[2, 7\], expected \[batch, time, channels\]"),
    ({"u": (2, 0, 3)}, "lmu needs at least one token, got length 0"),
    ({"order": 0}, "order is 0, expected at least 1"),
    ({"theta": 0}, "theta is 0, expected a positive number of tokens"),
    ({"theta": np.inf}, "theta is inf, expected a positive number"),
    ({"theta": jnp.ones(2)}, r"theta has shape \[2\], expected \[\] for u \[2, 7, 3\] and order 5"),
    ({"state": (2, 5, 3)}, r"state has shape \[2, 5, 3\], expected \[2, 3, 5\]"),
    ({"kernel": (3, 4, 2)}, r"kernel has shape \[3, 4, 2\], expected \[3, 5, 2\]"),
    ({"kernel": (15,)}, r"kernel has shape \[15\], expected \[3, 5, 15\]"),
    ({"reset": (2, 6)}, r"reset has shape \[2, 6\], expected \[2, 7\]"),
    ({"mask": (7,)}, r"mask has shape \[7\], expected \[2, 7\]"),
    ({"form": "serial"}, "form is 'serial', expected one of parallel, chunkwise, recurrent"),
    ({"method": "dft"}, "method is 'dft', expected one of gemm, fft or None"),
    ({"discretizer": "tustin"}, "discretizer is 'tustin', expected one of zoh, euler"),
    ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
  ],
)
def test_bad_arguments_are_told(change, message):
  arguments = {"u": (2, 7, 3), "order": 5, "theta": 24.0, **change}
  arguments = {k: np.zeros(a) if isinstance(a, tuple) else a for k, a in arguments.items()}
  with pytest.raises(ValueError, match=message):
    kernels.lmu(**arguments)
