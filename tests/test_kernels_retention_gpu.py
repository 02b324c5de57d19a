"""The GPU kernel of retention: interpreted against float64, and as a program for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from triform import kernels
from triform.kernels.retention import gpu, gpu_plan

PROGRAM = Path(__file__).parent / "retention_on_gpu.py"


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

  allowed = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
  export = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=allowed)
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


@pytest.mark.parametrize("k", gpu.SIZES)
@pytest.mark.parametrize("v", gpu.SIZES)
def test_every_size_has_a_plan_that_fits(k, v):
  for heads in (1, 64, 1000):
    for out_bytes in (0, 2, 4):  # states only, bfloat16, float32
      plan = gpu_plan.make_plan(heads, k, v, out_bytes)
      assert plan.shared_bytes <= gpu_plan.SHARED_BYTES
      assert v % plan.tile == 0 and plan.stages >= 1
