"""The interface's own functions, and what holds of modules beside the laws."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import laws_subjects
import numpy as np
import pytest
from flax import nnx
from laws_bench import BATCH, LENGTH, SUBJECTS, bench
from laws_errors import EXACT, error
from toy import ToyBlock

from triform import kernels
from triform.arch import Retention, Stack, put_rows, state_bytes, take_rows
from triform.arch.interface import FORMS, Scanned, check_call, state_dtype

D = laws_subjects.D
every_form = pytest.mark.parametrize("form", FORMS)


def test_check_call():
  x = np.zeros((2, 3, 4))
  check_call(x, "parallel", None, np.ones((2, 3), bool))
  for arguments, message in (
    ((x, "chunk", None, None), "expected one of"),
    ((x[:, :0], "parallel", None, None), "time > 0"),
    ((x[0, 0], "parallel", None, None), "batch, time"),
    ((x.tolist(), "parallel", None, None), "x is a list, expected an array"),
    ((x, "parallel", np.ones((2, 3)), None), "reset is float64"),
    ((x, "parallel", None, np.ones((2, 4), bool)), "mask is bool"),
    ((x, "parallel", None, [[True] * 3] * 2), "mask is a list, expected an array of bool"),
  ):
    with pytest.raises(ValueError, match=message):
      check_call(*arguments)


def test_state_dtype():
  for dtype, expected in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
    with jax.enable_x64():
      assert state_dtype(dtype) == expected


def test_rows_of_every_layout():
  """The batch comes first, but for the layer axis of a scanned stack."""
  rows = jnp.arange(3.0)
  state = (Scanned({"a": jnp.stack([rows, rows + 10])}), rows, {"b": rows[:, None]})
  taken = take_rows(state, jnp.array([2, 0]))
  chex.assert_trees_all_equal(taken[0].layers["a"], jnp.array([[2.0, 0.0], [12.0, 10.0]]))
  chex.assert_trees_all_equal(taken[1], jnp.array([2.0, 0.0]))
  chex.assert_trees_all_close(put_rows(state, jnp.array([2, 0]), taken), state)
  changed = put_rows(state, jnp.array([1]), take_rows(state, jnp.array([2])))
  chex.assert_trees_all_equal(changed[0].layers["a"][:, 1], jnp.array([2.0, 12.0]))
  assert state_bytes(state) == 4 * 12


def test_rank_promotion_raises():
  with pytest.raises(ValueError, match="rank"):
    jnp.ones(3) + jnp.ones((2, 3))


@every_form
def test_one_trace_per_form_and_shape(form):
  """New data, resets, masks and states are no reason to compile again."""
  chex.clear_trace_counter()
  module = bench("retention-gated", "float32").module()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def call(x, state, reset, mask):
    return module(x, state, form=form, reset=reset, mask=mask)

  state = module.init_state(BATCH)
  for seed in range(3):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=(BATCH, LENGTH, D)))
    _, state = call(x, state, *(rng.random((2, BATCH, LENGTH)) < 0.5))


@pytest.mark.parametrize(
  ("name", "form"), [*(("retention-gated", form) for form in FORMS), ("retnet-fla", "chunkwise")]
)
def test_takes_numpy_eagerly(name, form):
  """In float64 too, equal to the compiled call."""
  x = SUBJECTS[name].inputs(np.random.default_rng(0), BATCH, 4)
  for dtype in ("float32", "float64"):
    one = bench(name, dtype)
    reset, mask = np.eye(BATCH, 4, dtype=bool), np.ones((BATCH, 4), bool)
    with one.context():
      state = jax.tree.map(np.asarray, one.init_state())
      eager = one.module()(one._inputs(x), state, form=form, reset=reset, mask=mask)
    compiled = one.call(x, state, form=form, reset=reset, mask=mask)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, compiled)
    assert error(eager, compiled) <= (EXACT if dtype == "float64" else 1e-5)


def test_bfloat16_parameters_keep_a_wide_state():
  options = {"num_heads": 2, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
  for decay in ("fixed", "learned", "gated"):
    module = Retention(D, decay=decay, **options)
    y, state = jax.eval_shape(module, jax.ShapeDtypeStruct((1, 3, D), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state.kv.dtype == jnp.float32
    decays = nnx.state(module, lambda path, _: path[-1] == "log_rate")
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(decays))


@every_form
@pytest.mark.parametrize("decay", ["fixed", "learned", "gated"])
def test_decay_reaches_the_kernel_as_it_is(form, decay, monkeypatch):
  """A decay per head is not widened to one per token."""
  seen, original = [], kernels.retention

  def spy(q, k, v, log_decay, **options):
    seen.append(log_decay.ndim)
    return original(q, k, v, log_decay, **options)

  monkeypatch.setattr(kernels, "retention", spy)
  module = Retention(D, num_heads=2, decay=decay, rngs=nnx.Rngs(0))
  jax.eval_shape(lambda x: module(x, form=form), jax.ShapeDtypeStruct((1, 3, D), jnp.float32))
  assert seen == [3 if decay == "gated" else 1]


@functools.cache
def toy_stack(scan):
  options = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  stack = Stack(lambda r: ToyBlock(D, **options, rngs=r), 2, scan=scan, rngs=nnx.Rngs(0))
  return nnx.split(stack)


def train(scan, form, seed, *, mask=None):
  """Outputs, states and running statistics, the layers first."""

  @jax.jit
  def step(variables, x, mask, key):
    stack = nnx.merge(toy_stack(scan)[0], variables)
    y, state = stack(x, form=form, mask=mask, rngs=nnx.Rngs(key))
    return y, state, nnx.to_pure_dict(nnx.state(stack, nnx.BatchStat))

  x = np.float32(np.random.default_rng(0).normal(size=(BATCH, LENGTH, D)))
  y, state, statistics = step(toy_stack(scan)[1], x, mask, jax.random.key(seed))
  if scan:
    return y, state.layers, statistics["layers"]
  layers = [statistics["layers"][i] for i in range(2)]
  return y, *(jax.tree.map(lambda *a: jnp.stack(a), *each) for each in (state, layers))


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
def test_scanned_equals_unrolled_in_training(form):
  """Outputs, states, dropout and every layer's running statistics."""
  mask = np.random.default_rng(1).random((BATCH, LENGTH)) < 0.7
  scanned, unrolled = (train(scan, form, 1, mask=mask) for scan in (True, False))
  chex.assert_trees_all_close(scanned[0][mask], unrolled[0][mask], rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_close(scanned[1:], unrolled[1:], rtol=1e-5, atol=1e-5)
  norm = scanned[2]["norm"]
  assert np.all(norm["mean"] != 0) and np.all(norm["var"] != 1)  # they moved from where they began
  assert not np.allclose(norm["mean"][0], norm["mean"][1])


@pytest.mark.parametrize("scan", [True, False])
def test_dropout_follows_the_key(scan):
  one, other, again = (train(scan, "parallel", seed)[0] for seed in (1, 2, 1))
  assert np.any(one != other)
  chex.assert_trees_all_equal(one, again)


TREE_MODE = """
import sys, flax, pytest
assert flax.config.nnx_graph_mode is False
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_laws_hold_in_the_tree_mode_of_flax():
  """The suite's own process runs in graph mode."""
  tests = Path(__file__).parent
  laws = "(law_1 or law_2_windows or invisible or law_4_documents or law_5 or law_6)"
  chosen = f"(block or toy) and (float32 or training) and {laws}"
  run = subprocess.run(
    [sys.executable, "-c", TREE_MODE, "-q", "-x", str(tests / "test_laws.py"), "-k", chosen],
    cwd=tests.parent,
    env=os.environ | {"NNX_GRAPH_MODE": "false"},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
