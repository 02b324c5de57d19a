"""Tilings that cannot be are refused by name, before anything is compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from triform import kernels
from triform.kernels.retention import gpu_plan, gpu_sweep, tpu


def traced(f, t, k, v, *, dtype="bfloat16", **options):
  """Of a row and a head: a tiling that cannot be raises here."""
  heads = [jax.ShapeDtypeStruct((1, t, 1, size), dtype) for size in (k, k, v)]
  jax.eval_shape(lambda *heads: f(*heads, -jnp.ones(1), None, None, None, **options), *heads)


def refused(told):
  return pytest.raises(ValueError, match=re.escape(told))


@pytest.mark.parametrize(
  ("chunks", "told"),
  [
    (3, "chunks is 3, expected a divisor of the row's 4: 1, 2, 4"),
    (8, "chunks is 8, expected a divisor of the row's 4: 1, 2, 4"),
    (0, "chunks is 0, expected"),
    (-1, "chunks is -1, expected"),
  ],
)
def test_chunks_of_a_tpus_step_divide_the_row(chunks, told):
  traced(tpu.chunkwise, 512, 128, 128, chunks=2)
  with refused(told):
    traced(tpu.chunkwise, 512, 128, 128, chunks=chunks)


def test_a_tpus_step_is_bounded():
  with refused("chunks is 16, expected a divisor of the row's 16: 1, 2, 4, 8"):
    traced(tpu.chunkwise, 2048, 128, 128, chunks=16)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_tpus_step_fits_on_chip(gradient):
  """With states of more than the kernel takes; the largest that it takes fit in every step."""

  def f(*arrays, **options):
    def loss(q):
      return sum(jnp.sum(a) for a in tpu.chunkwise(q, *arrays[1:], **options))

    return jax.grad(loss)(arrays[0]) if gradient else loss(arrays[0])

  for chunks in (1, 2, 4, 8):
    traced(f, 1024, 512, 512, dtype="float32", chunks=chunks)
  size = 1024 if gradient else 1536
  traced(f, 1024, size, size, dtype="float32", chunks=1)
  with pytest.raises(ValueError, match=r"chunks is 8: a step needs \d+ bytes of VMEM, expected at"):
    traced(f, 1024, size, size, dtype="float32", chunks=8)


@pytest.mark.parametrize(("t", "k", "v"), [(100, 128, 128), (128, 64, 128), (128, 128, 192)])
def test_a_tpus_blocks_are_whole_registers(t, k, v):
  """Which is what surrounds the kernel fills them up for."""
  heads = [jax.ShapeDtypeStruct((1, t, size), jnp.bfloat16) for size in (k, k, v)]
  state = jax.ShapeDtypeStruct((1, 1, k, v), jnp.float32)
  told = f"{t} tokens, keys of {k} and values of {v}: expected multiples of 128"
  with refused(told):
    jax.eval_shape(
      lambda q, k, v, s: tpu._chunkwise(q, k, v, jnp.ones(1), None, None, s, False, None),
      *heads,
      state,
    )


PLAN = gpu_plan.Plan(128, 64, 2, 1, 2, 2, (208, 40, None)).deepened()


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"k": 96}, "k is 96, expected one of (64, 128, 256, 512)"),
    ({"tile": 32}, "tile is 32, expected one of (64, 128) for keys of 128"),
    ({"tile": 96}, "tile is 96, expected one of (64, 128) for keys of 128"),
    ({"k": 256, "tile": 128}, "tile is 128, expected one of (64,) for keys of 256"),
    ({"keepers": 0}, "keepers is 0, expected a divisor of 2"),
    ({"keepers": 3}, "keepers is 3, expected a divisor of 2"),
    ({"stages": 3}, "stages is 3, expected a multiple of 2"),
    ({"stages": 8}, "stages is 8, expected at most 229376 bytes of shared memory, not 335872"),
    ({"slots": 9}, "stages is 4, expected at most 229376 bytes of shared memory, not"),
    ({"registers": (208, 44, None)}, "registers is (208, 44, None), expected multiples of 8"),
    ({"registers": (232, 40, 232)}, "registers is (232, 40, 232), expected multiples of 8"),
    ({"registers": (264, 40, None)}, "registers is (264, 40, None), expected multiples of 8"),
  ],
)
def test_a_plan_that_a_gpu_cannot_run_is_refused(change, told):
  with refused(told):
    dataclasses.replace(PLAN, **change)


def test_a_plan_of_which_not_one_stage_fits_is_refused():
  with refused("stages is 2, expected at most 229376 bytes of shared memory, not"):
    dataclasses.replace(PLAN, stages=0, value_stages=16).deepened()


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"tile": 128, "v": 64}, "tile is 128, expected one of (64, 128) that divides the 64 columns"),
    ({"tile": 96, "v": 192}, "tile is 96, expected one of (64, 128) that divides the 192"),
    ({"tile": 128, "k": 256}, "tile is 128, expected one of (64,) for keys of 256"),
    ({"pieces": 3}, "pieces is 3, expected a divisor of the 16 chunks"),
    ({"pieces": 0}, "pieces is 0, expected a divisor of the 16 chunks"),
    ({"t": 1000}, "there are 1000 tokens, expected whole chunks of 64"),
  ],
)
def test_a_sweep_that_cannot_be_laid_out_is_refused(options, told):
  sizes = {"t": 1024, "k": 128, "v": 128} | {n: options.pop(n) for n in "tkv" if n in options}
  t, k, v = sizes.values()

  def f(*arrays):
    *heads, rate, exponent, segment, _ = arrays
    return gpu_sweep.sweep(*heads, rate, exponent, segment, jnp.zeros((1, 1, k, v)), **options)

  with refused(told):
    traced(f, t, k, v)


def test_chunks_of_no_token_are_refused():
  with refused("chunk_size is 0, expected at least 1"):
    traced(lambda *a, **o: kernels.retention(*a[:4], **o), 128, 4, 4, chunk_size=0)
