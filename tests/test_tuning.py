"""Layouts of kernels that were measured: how they are found, kept and used."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tune
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from laws_errors import equations
from measure import Time

from triform.kernels.retention import gpu, gpu_plan, gpu_sweep, specs, tpu, tuned

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

HERE = "cpu"  # the kind of the device that is here
SHAPE = specs.Shape(1, 256, 1, 128, 128)  # a step by the heuristic, or two


def case(direction="forward", packed=False):
  cases = tune.tpu_cases([SHAPE], ["float32"], interpret=True)
  return next(c for c in cases if (c.key["pass"], c.key["packed"]) == (direction, packed))


def entry(key, choice, device=HERE):
  return {"device": device, "key": key, "choice": choice, "ratio": 0.5, "noise": 0.01}


@pytest.fixture
def table(tmp_path, monkeypatch):
  """An empty one, in which kernels look while it lasts."""
  path = tmp_path / "tuned.json"
  path.write_text("[]\n")
  monkeypatch.setattr(tuned, "TABLE", path)
  return path


def clock(*seconds, noise=0.0):
  """A measurement that found these times: of the heuristic's choice, then the others.

  The heuristic's second turns take the same, up to `noise` more.
  """

  def measure(runs):
    assert len(runs) == 1 + len(seconds)
    again = [Time(seconds[0] * (1 + noise * n / 9), 0.0) for n in range(10)]
    return [again, *([Time(s, 0.0)] * 10 for s in seconds)]

  return measure


def grids(t=256, size=128, gradient=False, dtype=jnp.float32, **options):
  """Of the kernels in the program, in the order of their names."""
  heads = [jax.ShapeDtypeStruct((1, t, 1, size), dtype)] * 3

  def results(q, k, v):
    return tpu.chunkwise(q, k, v, -jnp.ones(1), None, None, None, interpret=True, **options)

  def loss(*heads):
    return sum(jnp.sum(a.astype(jnp.float32)) for a in results(*heads))

  found = equations(jax.grad(loss) if gradient else results, *heads)
  kernels = [e.params for e in found if e.primitive.name == "pallas_call"]
  return sorted((kernel["name"], kernel["grid_mapping"].grid) for kernel in kernels)


def test_the_winner_is_written_and_the_kernel_uses_it(table):
  heuristic = [("retention_forward", (1, 1, 1))]
  assert grids() == heuristic
  rows = tune.tune(case(), table, HERE, clock(1.0, 0.8))
  assert [(row["choice"], row["written"]) for row in rows] == [
    ({"chunks": 2}, False),
    ({"chunks": 1}, True),
  ]
  (kept,) = json.loads(table.read_text())
  assert (kept["device"], kept["choice"], kept["ratio"]) == (HERE, {"chunks": 1}, 0.8)
  assert grids() == [("retention_forward", (1, 1, 2))]
  assert grids(dtype=jnp.bfloat16) == heuristic  # of which nothing is known
  backward = [("retention_backward", (1, 1, 1)), ("retention_forward", (1, 1, 1))]
  assert grids(gradient=True) == backward
  tune.tune(case("backward"), table, HERE, clock(1.0, 0.8))
  assert {grid for _, grid in grids(gradient=True)} == {(1, 1, 2)}


def test_results_do_not_depend_on_the_choice():
  """In both directions."""
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=(1, 512, 1, 128)) / 4, jnp.float32) for _ in range(3)]

  @jax.jit
  def gradients(q, k, v):
    def loss(chunks, *arrays):
      results = tpu.chunkwise(
        *arrays, -jnp.ones(1) / 8, None, None, None, interpret=True, chunks=chunks
      )
      return sum(jnp.sum(jnp.square(a)) for a in results)

    return [jax.grad(loss, argnums=(1, 2, 3))(chunks, q, k, v) for chunks in (1, 2, 4)]

  first, *others = gradients(*arrays)
  for other in others:
    for one, expected in zip(other, first, strict=True):
      np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("seconds", "noise"), [((1.0, 1.1), 0.0), ((1.0, 1.0), 0.0), ((1.0, 0.98), 0.05)]
)
def test_a_loss_and_a_tie_within_the_noise_write_nothing(table, seconds, noise):
  tune.tune(case(), table, HERE, clock(*seconds, noise=noise))
  assert table.read_text() == "[]\n"


def test_entries_of_other_devices_and_keys_survive(table):
  others = [entry(case().key, {"chunks": 2}, "TPU v9"), entry(case(packed=True).key, {"chunks": 1})]
  for one in others:
    tuned.write(table, one)
  for seconds in (0.9, 0.7):
    tune.tune(case(), table, HERE, clock(1.0, seconds))
  kept = json.loads(table.read_text())
  assert all(one in kept for one in others) and len(kept) == 3
  assert [one["ratio"] for one in kept if one not in others] == [0.7]
  assert len(table.read_text().splitlines()) == 5  # an entry a line


def test_what_is_measured_are_the_choices(table):
  """The programs run, each with its own grid."""

  def measure(runs):
    results = [jax.block_until_ready(run()) for run in runs]
    for one in results[1:]:
      for a, b in zip(one, results[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return clock(1.0, 0.5)(runs)

  (row,) = tune.tune_all([case()], table, HERE, measure)[1:]
  assert row["written"] and row["choice"] == {"chunks": 1}


def test_the_shipped_table_has_only_choices_that_there_are():
  """Every entry is one of those that are measured, by which its kernel asks."""
  cases = [*tune.tpu_cases(), *tune.gpu_cases()]
  for one in tuned.read(tuned.TABLE):
    assert any(one["choice"] in c.choices for c in cases if c.key == one["key"]), one


def test_entries_of_other_devices_are_not_used(table):
  tuned.write(table, entry(case().key, {"chunks": 1}, "TPU v9"))
  assert grids() == [("retention_forward", (1, 1, 1))]


def test_a_program_for_a_device_that_is_not_here_is_the_heuristics(table):
  tuned.write(table, entry(case().key, {"chunks": 1}))
  device = AbstractDevice(device_kind="TPU v9", num_cores=None, platform="tpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert tuned.look_up(case().key) is None
  assert tuned.look_up(case().key) == {"chunks": 1}


@pytest.mark.parametrize("chunks", [3, 0, 8, 1.5, None])
def test_an_impossible_entry_is_named_with_its_file(table, chunks):
  tuned.write(table, entry(case().key, {"chunks": chunks}))
  told = f"chunks in {table} is {chunks!r}, expected a divisor of the row's 2: 1, 2"
  with pytest.raises(ValueError, match=re.escape(told)):
    grids()


@pytest.mark.parametrize(
  ("choice", "told"),
  [
    ({"tile": 128, "pieces": 1}, "tile is 128, expected one of (64,) for keys of 256"),
    ({"tile": 64, "pieces": 3}, "pieces is 3, expected a divisor of the 16 chunks"),
    ({"tile": 64}, "'pieces'"),
  ],
)
def test_an_impossible_entry_for_a_gpu_is_named_with_its_file(table, choice, told):
  dtype = jnp.dtype("bfloat16")
  sizes = (1, 1024, 256, 128, dtype, False)  # heads, tokens, keys, values
  assert gpu_plan.measured(*sizes) == {}
  tuned.write(table, entry(gpu_plan.make_key(*sizes), choice))
  with pytest.raises(ValueError, match=re.escape(told)) as raised:
    gpu_plan.measured(*sizes)
  assert str(raised.value).startswith(f"{table} has {{")


def test_a_gpu_uses_what_was_measured(table, monkeypatch):
  """Columns of a block, and pieces: of a row that the heuristic cuts into four."""
  b, t, h, k, v = 1, 2048, 1, 128, 128
  launched, launch = [], gpu_sweep._sweep

  def record(plan, q, *arrays, **options):
    launched.append((plan.tile, q.shape[0]))
    return launch(plan, q, *arrays, **options)

  def trace():
    launched.clear()
    heads = [jax.ShapeDtypeStruct((b, t, h, size), jnp.bfloat16) for size in (k, k, v)]
    jax.eval_shape(lambda *heads: gpu.chunkwise(*heads, -jnp.ones(h), None, None, None), *heads)
    return launched[-1]

  monkeypatch.setattr(gpu_sweep, "_sweep", record)
  assert trace() == (64, 4)
  choice = {"tile": 128, "pieces": 2}
  assert choice in tune.gpu_choices(b * h, t, k, v, 2)[1:]
  tuned.write(table, entry(gpu_plan.make_key(b * h, t, k, v, jnp.dtype("bfloat16"), False), choice))
  assert trace() == (128, 2)


@pytest.mark.parametrize("text", ["[", '[{"device": "cpu"}]'])
def test_a_table_that_cannot_be_read_is_named(table, text):
  table.write_text(text)
  tuned.read.cache_clear()
  with pytest.raises(ValueError, match=re.escape(str(table))):
    tuned.look_up(case().key)


def test_tuning_without_an_accelerator_ends_with_a_line():
  done = subprocess.run(
    [sys.executable, BENCHMARKS / "tune.py"], capture_output=True, text=True, check=False
  )
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr == "Tuning needs a TPU or a Hopper GPU, JAX has found: cpu.\n"
