"""The GPU kernel of retention: interpreted against float64, and as a program for a GPU."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from triform import kernels
from triform.kernels.retention import gpu, gpu_plan

PROGRAM = Path(__file__).parent / "retention_on_gpu.py"
ALLOWED = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["packed", "per token", "in pieces"])
def test_results_and_gradients_equal_the_oracle(case):
  """In a process of its own, which ends if the interpreted warpgroups wait for each other."""
  environment = os.environ | {"NPROC": "32", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, str(PROGRAM), case]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  ulp = float(jnp.finfo(jnp.bfloat16).eps)
  for name, (error, simplest) in json.loads(done.stdout.splitlines()[-1]).items():
    assert error <= 2 * simplest + 4 * ulp, name


def exported(dtype=jnp.bfloat16, t=256, size=128, **options):
  """The program of a gradient for a GPU, as text."""
  heads = [jax.ShapeDtypeStruct((1, t, 2, size), dtype)] * 3

  def loss(q, k, v):
    return jnp.sum(kernels.retention(q, k, v, -jnp.ones(2), **options)[0].astype(jnp.float32))

  export = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=ALLOWED)
  return export(*heads).mlir_module()


@pytest.mark.parametrize(
  ("options", "kernel_runs"),
  [
    ({"implementation": "gpu"}, True),
    ({"implementation": ("tpu", "gpu"), "t": 100}, True),
    ({"implementation": ("gpu", "xla"), "dtype": jnp.float16}, False),
    ({}, False),  # not yet run on one, so only by name
  ],
)
def test_which_implementation_is_in_the_program(options, kernel_runs):
  assert ("mosaic_gpu" in exported(**options)) == kernel_runs


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"dtype": jnp.float16}, "gpu: q, k and v are float16, expected all bfloat16 or all float32"),
    ({"form": "parallel"}, "gpu: the form is 'parallel', expected 'chunkwise'"),
    ({"size": 600}, "gpu: keys and values have size 600 and 600, expected at most 512"),
  ],
)
def test_what_the_kernel_does_not_take_is_told(options, told):
  with pytest.raises(NotImplementedError, match=told):
    exported(implementation="gpu", **options)


@pytest.mark.parametrize(
  ("b", "t", "h", "size", "told"),
  [
    (1, 2**25, 63, 64, None),  # 2^37 elements, more than any GPU holds
    (1, 2**25, 64, 64, "there are 2147483648 vectors of queries, expected fewer than 2\\^31"),
    (1, 2**25 - 63, 64, 64, "there are 2147483648 vectors"),  # with its padding
    (2**10, 64, 7, 512, None),
    (2**10, 64, 8, 300, "the state has 2147483648 elements, expected fewer than 2\\^31"),
  ],
)
def test_what_is_counted_in_32_bits_is_limited(b, t, h, size, told):
  array = jax.ShapeDtypeStruct((b, t, h, size), jnp.bfloat16)
  reason = gpu.unsupported_reason(array, array, array, None)
  assert reason is None if told is None else re.match(told, reason)


def test_a_mesh_divides_what_is_counted():
  array = jax.ShapeDtypeStruct((2**10, 64, 8, 300), jnp.bfloat16)

  def shapes():
    decays = jax.ShapeDtypeStruct((8,), jnp.float32)
    return jax.eval_shape(
      functools.partial(kernels.retention, implementation="gpu"), array, array, array, decays
    )

  with pytest.raises(NotImplementedError, match="the state has 2147483648 elements"):
    shapes()
  with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
    out, state = shapes()
  assert out.shape == array.shape and state.shape == (2**10, 8, 300, 300)


@pytest.mark.parametrize("k", gpu.SIZES)
@pytest.mark.parametrize("v", gpu.SIZES)
def test_every_size_has_a_plan_that_fits(k, v):
  for heads in (1, 64, 1000):
    for out_bytes in (0, 2, 4):  # states only, bfloat16, float32
      plan = gpu_plan.make_plan(heads, k, v, out_bytes)
      assert plan.shared_bytes <= gpu_plan.SHARED_BYTES
      assert v % plan.tile == 0 and plan.stages >= 1


@pytest.mark.parametrize("learned", [True, False])
def test_gradients_are_float32_only_for_those_of_decays(learned):
  """Of queries and keys. Known through a scan over layers that are computed again, too."""

  @jax.checkpoint
  def layer(x, log_decay):
    return kernels.retention(x, x, x, log_decay, implementation="gpu")[0]

  def loss(x, log_decay):
    x, _ = jax.lax.scan(lambda x, _: (layer(x, log_decay), None), x, length=2)
    return jnp.sum(x.astype(jnp.float32))

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1) if learned else 0))
  arrays = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2,), "f4")
  export = jax.export.export(gradient, platforms=["cuda"], disabled_checks=ALLOWED)
  launches = re.findall(r"@mosaic_gpu_v2\(.* -> \((.*?)\)", export(*arrays).mlir_module())
  outputs = [re.findall(r"tensor<1x256x2x128x(\w+)>", launch) for launch in launches]
  narrow, wide = ["bf16"], ["f32"]
  assert sorted(outputs) == sorted([narrow, narrow, *([wide, wide] if learned else [narrow] * 2)])
