"""Programs compiled for an H100 that is not here: JAX's CUDA plugin and ptxas need no driver."""

import importlib
import importlib.util
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from triform import kernels
from triform.kernels.retention import specs

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs jax_cuda13_plugin, see BUILD.md",
  ),
]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
H100 = (BENCHMARKS / "h100.txtpb").read_text()
# More than 2^31 elements of q, in two pieces and in one.
LARGE = specs.Shape(1, 2**20 + 1024, 16, 128, 128), specs.Shape(2, 2**17 + 64, 64, 128, 128)
# Pallas-Triton wants to know for what, from JAX 0.11.2 on.
DEVICE = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")


def arrays(default="bfloat16"):
  """Makes arguments that lie on the H100."""
  devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
  ).devices
  sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), P())

  def array(sizes, dtype=default):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  return array


@pytest.mark.parametrize(
  ("dtype", "shape"),
  [*itertools.product(["bfloat16", "float32"], specs.ALL), *(("bfloat16", one) for one in LARGE)],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_retention_compiles_at_named_shapes(dtype, shape):
  """Forward and backward; what does not fit a multiprocessor is refused."""
  array = arrays(dtype)
  b, t, h, k, v = shape

  def loss(q, k, v, log_decay):
    out, state = kernels.retention(q, k, v, log_decay, implementation="gpu")
    return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(jnp.square(state))

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
  heads = [array((b, t, h, size)) for size in (k, k, v)]
  if dtype == "bfloat16":
    text = step.lower(*heads, array((h,), jnp.float32)).compile().as_text()
  else:
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=DEVICE)):
      text = step.lower(*heads, array((h,), jnp.float32)).compile().as_text()
  kernel = {"bfloat16": "mosaic_gpu", "float32": "retention_sweep"}[dtype]
  assert text.count(kernel) >= 4  # the forward pass and three gradients


@pytest.mark.parametrize("shape", [shape for shape in specs.DECODING if shape.b > 1])
def test_a_decoding_step_reads_and_writes_the_state_once(monkeypatch, shape):
  """A small state, of one row, is read again, out of the cache."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  from hlo_bytes import moved

  array = arrays()
  b, t, h, k, v = shape
  heads = [array((b, t, h, size)) for size in (k, k, v)]
  state = array((b, h, k, v), jnp.float32)

  def step(q, k, v, log_decay, state):
    return kernels.retention(q, k, v, log_decay, state=state, form="recurrent")

  step = jax.jit(step, donate_argnums=4)
  program = step.lower(*heads, array((h,), jnp.float32), state).compile()
  assert moved(program.as_text()) < 2.1 * 4 * state.size
  assert program.memory_analysis().alias_size_in_bytes >= 4 * state.size


def test_products_in_32_bits_count_rows(monkeypatch):
  """In machine code for more than 2^31 elements, as numbers of elements would not fit."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  gpu_static = importlib.import_module("gpu_static")
  shape = specs.Shape(3, 2**16 + 64, 96, 128, 128)
  rows = shape.t * shape.h
  assert shape.b * rows * shape.k > 2**31
  codes = gpu_static.launches(shape, "packed")
  assert len(codes) >= 2  # forward, and backward in time
  for code in codes:
    assert "cp.async.bulk.tensor" in code
    factors = re.findall(r"(?:mul|mad)\.lo\.s32\s+\S+ \S+ (\d+)", code)
    assert str(rows) in factors and max(map(int, factors)) == rows
