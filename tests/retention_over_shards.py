"""Retention of rows whose tokens are divided over devices: `test_sharding.py` runs it on eight."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from laws_errors import error

from triform import kernels
from triform.kernels.retention import reference, tpu

B, T, H, G, K, V = 2, 40, 4, 2, 3, 5
EPS = float(jnp.finfo(jnp.float32).eps)
NAMES = ("q", "k", "v", "log_decay", "state")


def numbers(seed, decay, sizes=(B, T, H, G, K, V)):
  """q, k, v, log_decay and state."""
  b, t, h, g, k, v = sizes
  rng = np.random.default_rng(seed)
  shapes = [(b, t, h, k), (b, t, g, k), (b, t, g, v), (h,) if decay == "[h]" else (b, t, h)]
  arrays = [np.float32(rng.normal(size=shape)) for shape in (*shapes, (b, h, k, v))]
  arrays[3] = -0.1 * np.abs(arrays[3])
  return tuple(arrays)


def over_shards(arrays, reset, mask, *, n, check_vma, **options):
  """One device's call, in which the tokens are a shard's."""
  tokens = P(None, "seq")
  decays = tokens if arrays[3].ndim == 3 else P()
  specs = ((tokens, tokens, tokens, decays, P()), tokens, tokens)

  def shard(arrays, reset, mask):
    *arrays, state = arrays
    options_of_all = {"state": state, "reset": reset, "mask": mask, **options}
    return kernels.retention(*arrays, sequence_axis="seq", **options_of_all)

  mesh = jax.make_mesh((n,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
  results = jax.shard_map(
    shard, mesh=mesh, in_specs=specs, out_specs=(tokens, P()), check_vma=check_vma
  )
  return results(arrays, reset, mask)


def plain(arrays, reset, mask, **options):
  """On one device; the simplest form unless told otherwise."""
  *arrays, state = arrays
  options = options or {"form": "recurrent"}
  return kernels.retention(*arrays, state=state, reset=reset, mask=mask, **options)


STATIC = ("n", "check_vma", "form", "implementation")


@functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
def with_gradients(f, arrays, cotangents, reset, mask, **options):
  results, backward = jax.vjp(lambda arrays: f(arrays, reset, mask, **options), arrays)
  return results, backward(cotangents)[0]


@pytest.mark.parametrize(
  ("n", "form", "decay", "check_vma"),
  [
    (2, "chunkwise", "[h]", True),
    (4, "parallel", "[b, t, h]", False),
    (8, "chunkwise", "[b, t, h]", True),
    (8, "recurrent", "[h]", False),
  ],
)
@given(
  st.integers(0, 999),
  st.sampled_from([0.0, 0.03, 0.3]),
  st.sampled_from([0.0, 0.1, 0.9]),
  st.integers(0, 7),
)
def test_shards_equal_the_oracle(n, form, decay, check_vma, seed, starts, holes, padding):
  """Outputs, state and gradients, within twice the error of the simplest form and four roundings.

  A shard is all padding, and so are the first tokens of the second row.
  """
  rng = np.random.default_rng(seed)
  reset, mask = rng.random((B, T)) < starts, rng.random((B, T)) >= holes
  mask[:, padding * T // 8 : (padding + 1) * T // 8] = False
  mask[1, : T // 4] = False
  arrays = numbers(seed, decay)
  cotangents = (
    np.float32(rng.normal(size=(B, T, H, V)) * mask[..., None, None]),
    np.float32(rng.normal(size=(B, H, K, V))),
  )
  options = {"n": n, "form": form, "check_vma": check_vma}
  (out, after), d = with_gradients(over_shards, arrays, cotangents, reset, mask, **options)
  (one_out, one_after), one_d = with_gradients(plain, arrays, cotangents, reset, mask)
  with jax.enable_x64():
    wide = jax.tree.map(np.float64, (arrays, cotangents))
    _, expected_d = with_gradients(plain, *wide, reset, mask)
  *heads, state = arrays
  expected_out, expected_after = reference.retention(*heads, state=state, reset=reset, mask=mask)
  rows = [("out", out[mask], one_out[mask], expected_out[mask])]
  rows += [("state", after, one_after, expected_after)]
  rows += zip(NAMES, d, one_d, expected_d, strict=True)
  for name, got, simplest, expected in rows:
    assert error(got, expected) <= 2 * error(simplest, expected) + 4 * EPS, name


def test_a_kernel_takes_its_shard(monkeypatch):
  """The TPU's, interpreted: within twice its error on one device and four roundings."""
  monkeypatch.setattr(tpu, "chunkwise", functools.partial(tpu.chunkwise, interpret=True))
  arrays = numbers(0, "[h]", (1, 256, 2, 1, 64, 64))
  reset = np.zeros((1, 256), bool)
  reset[0, 7] = True
  cotangents = (np.ones((1, 256, 2, 64), np.float32), np.ones((1, 2, 64, 64), np.float32))
  options = {"n": 2, "check_vma": False, "implementation": "tpu"}
  got = with_gradients(over_shards, arrays, cotangents, reset, None, **options)
  whole = with_gradients(plain, arrays, cotangents, reset, None, implementation="tpu")
  with jax.enable_x64():
    wide = jax.tree.map(np.float64, (arrays, cotangents))
    expected = with_gradients(plain, *wide, reset, None)
  for one, other, truth in zip(*map(jax.tree.leaves, (got, whole, expected)), strict=True):
    assert error(one, truth) <= 2 * error(other, truth) + 4 * EPS


def test_a_reset_forgets_what_came_before_an_earlier_shard():
  *arrays, state = numbers(0, "[h]")
  reset = np.zeros((B, T), bool)
  reset[:, 12] = True  # in the second of four
  run = functools.partial(over_shards, n=4, check_vma=True)
  expected = jax.jit(run)((*arrays, state), reset, None)
  out, after = jax.jit(run)((*arrays, np.full_like(state, np.nan)), reset, None)
  assert np.isnan(out[:, :12]).all()
  np.testing.assert_array_equal(out[:, 12:], expected[0][:, 12:])
  np.testing.assert_array_equal(after, expected[1])


def test_a_row_of_padding_keeps_its_state_bit_for_bit():
  *arrays, state = numbers(0, "[h]")
  state[0, 0, 0, 0] = -0.0
  mask = np.zeros((B, T), bool)
  mask[1, 30:] = True
  run = functools.partial(over_shards, n=4, check_vma=True)
  _, after = jax.jit(run)((*arrays, state), None, mask)
  np.testing.assert_array_equal(np.asarray(after[0]).view(np.int32), state[0].view(np.int32))
  assert not np.array_equal(after[1], state[1])


@pytest.mark.parametrize("check_vma", [True, False])
def test_only_states_are_exchanged(check_vma):
  n, sizes = 4, (2, 256, 2, 2, 8, 8)
  arrays = numbers(0, "[h]", sizes)
  results = jax.eval_shape(plain, arrays, None, None)
  run = functools.partial(over_shards, n=n, check_vma=check_vma)
  text = with_gradients.lower(run, arrays, results, None, None).compile().as_text()
  collectives = re.findall(r"= (.+?) (?:all-|reduce-scatter|collective-)\S*\(", text)
  assert collectives
  for shapes in collectives:
    for shape in re.findall(r"\[([\d,]*)\]", shapes):
      assert math.prod(map(int, filter(None, shape.split(",")))) <= n * arrays[-1].size


def test_a_shard_computes_its_outputs_once():
  """What is added to the state costs one product more, `k^T v` over the shard's tokens."""
  n, sizes = 2, (1, 768, 2, 2, 32, 32)
  b, t, h, _, k, v = sizes
  arrays = numbers(0, "[h]", sizes)
  *shard, state = numbers(0, "[h]", (b, t // n, *sizes[2:]))

  def operations(f, arrays):
    return jax.jit(f).lower(arrays).compile().cost_analysis()["flops"]

  def alone(arrays):
    return kernels.retention(*arrays[:-1], state=arrays[-1])

  sharded = operations(lambda a: over_shards(a, None, None, n=n, check_vma=True), arrays)
  product = 2 * b * t // n * h * k * v
  assert product <= sharded - operations(alone, (*shard, state)) <= 1.2 * product


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("sequence_axis", ["seq", None])
def test_rows_are_divided_too(form, sequence_axis):
  """By hand and checked, from a state of zeros, which JAX knows to be everywhere the same."""
  *arrays, _ = numbers(0, "[h]")
  mesh = jax.make_mesh(
    (2, 4), ("rows", "seq"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()
  )
  tokens = P("rows", sequence_axis)

  def retention(form, *arrays, **options):
    return kernels.retention(*arrays, form=form, chunk_size=4, **options)

  sharded = jax.shard_map(
    functools.partial(retention, form, sequence_axis=sequence_axis),
    mesh=mesh,
    in_specs=(tokens, tokens, tokens, P()),
    out_specs=(tokens, P("rows")),
  )

  def gradients(f, *arrays):
    def loss(*arrays):
      return sum(jnp.sum(jnp.square(a)) for a in f(*arrays))

    return jax.jit(jax.grad(loss, argnums=range(4)))(*arrays)

  simplest = functools.partial(retention, "recurrent")
  with jax.enable_x64():
    expected = gradients(simplest, *map(np.float64, arrays))
  results = gradients(sharded, *arrays), gradients(simplest, *arrays), expected
  for one, other, truth in zip(*results, strict=True):
    assert error(one, truth) <= 2 * error(other, truth) + 4 * EPS
