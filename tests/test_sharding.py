"""Meshes, sharding rules, and that a run on eight devices is the run on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from triform.arch.sharding import make_mesh, shard_state

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results():
  """Of `meshes.py`, by mesh and model; and of a kernel."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, str(HERE / "meshes.py")],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", ["fsdp=-1", "data=2,fsdp=4"])
@pytest.mark.parametrize("model", ["retnet", "toy"])
def test_eight_devices_give_the_losses_of_one(results, mesh, model):
  """Batch statistics, the average and accumulated parts included; to the rounding of sums."""
  one, eight = results["data=1"][model], results[mesh][model]
  for name in ("losses", "average", "statistics"):
    np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-5)


def test_a_kernel_runs_on_each_device_with_what_is_there(results):
  kernel = results["kernel"]
  assert kernel["error"] <= 1e-6 and kernel["placed"] and not kernel["gathers"]


@pytest.mark.slow
def test_retention_over_shards():
  """In a process of its own, for its devices."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "retention_over_shards.py")]
  done = subprocess.run(
    [*command, "-p", "no:cacheprovider"],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-3000:]


def test_every_device_holds_its_part_of_every_matrix(results):
  for model in ("retnet", "toy"):
    meshes = ("data=1", "fsdp=-1", "data=2,fsdp=4")
    parts = [results[mesh][model]["largest_part"] for mesh in meshes]
    assert parts == [1, 1 / 8, 1 / 4]


@pytest.mark.parametrize("spec", ["model=2", "fsdp", "fsdp=0", "data=-2", "fsdp=2 data=2"])
def test_a_mesh_that_cannot_be_read_is_refused(spec):
  with pytest.raises(ValueError, match=r"expected text such as data=2,fsdp=4"):
    make_mesh(spec)


def test_a_mesh_larger_than_the_machine_is_refused():
  with pytest.raises(ValueError, match="of 4096 devices, but there are"):
    make_mesh("fsdp=4096")
  with pytest.raises(ValueError, match=r"does not divide \d+ devices"):
    make_mesh("data=4096,fsdp=-1")


def mesh_of(data, fsdp):
  return AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def specs(tree, *rules):
  shardings = shard_state(tree, mesh_of(2, 4), *rules)
  return jax.tree.map(lambda sharding: sharding.spec, shardings)


def shaped(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_rules_place_parameters_and_what_has_their_shape():
  params = {
    "embedding": {"embedding": shaped(9, 8)},
    "stack": {"layers": {"mixer": {"output": {"kernel": shaped(3, 5, 8)}}}},
    "norm": {"scale": shaped(8)},
  }
  moments = {"mu": params, "row": {"norm": {"scale": shaped(1)}}, "count": shaped()}
  placed = specs({"params": params, "optimizer": moments, "variables": {"mean": shaped(8)}})
  assert placed["params"]["embedding"]["embedding"] == P(None, "fsdp")
  assert placed["params"]["stack"]["layers"]["mixer"]["output"]["kernel"] == P(None, None, "fsdp")
  assert placed["optimizer"]["mu"] == placed["params"]
  for replicated in (placed["optimizer"]["row"], placed["optimizer"]["count"], placed["variables"]):
    assert all(spec == P() for spec in jax.tree.leaves(replicated))


def test_an_unmatched_parameter_is_named():
  with pytest.raises(ValueError, match=r"no sharding rule matches parameter head/weight of .*8"):
    specs({"params": {"head": {"weight": shaped(8, 8)}}})


def test_an_indivisible_parameter_is_named():
  with pytest.raises(ValueError, match=r"head/kernel has shape \[6, 8\]: 6 cannot be divided .* 4"):
    specs({"params": {"head": {"kernel": shaped(6, 8)}}})


def test_a_rule_with_too_many_axes_is_named():
  rules = ((r"scale$", (None, "fsdp")),)
  with pytest.raises(ValueError, match=r"'scale\$' names 2 axes, but parameter norm/scale has .*8"):
    specs({"params": {"norm": {"scale": shaped(8)}}}, rules)
