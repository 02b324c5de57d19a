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
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from triform import kernels
from triform.kernels.retention import api, specs

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
SMALL = specs.Shape(2, 256, 4, 128, 128)
KERNELS = {"bfloat16": "mosaic_gpu", "float32": "retention_sweep"}


def mesh_of(rows: int = 1, heads: int = 1):
  """Of H100s in one machine."""
  devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology=f"1x1x{rows * heads}", target_config=H100
  ).devices
  axis_types = (AxisType.Auto,) * 2
  return Mesh(np.array(devices).reshape(rows, heads), ("rows", "heads"), axis_types=axis_types)


def retention_gradient(mesh, dtype, shape, *, packed=False):
  """The compiled program of outputs and every gradient, as text."""
  b, t, h, k, v = shape

  def array(sizes, *axes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*axes)))

  heads = [array((b, t, h, size), "rows", None, "heads") for size in (k, k, v)]
  log_decay = array((h,), "heads", dtype=jnp.float32)
  tokens = array((b, t), "rows", dtype=bool) if packed else None

  def loss(q, k, v, log_decay, reset, mask):
    options = {"reset": reset, "mask": mask, "implementation": "gpu"}
    out, state = kernels.retention(q, k, v, log_decay, **options)
    return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(jnp.square(state))

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
  # Pallas-Triton wants to know for what device, from JAX 0.11.2 on.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return step.lower(*heads, log_decay, tokens, tokens).compile().as_text()


@pytest.mark.parametrize(
  ("dtype", "shape"),
  [*itertools.product(["bfloat16", "float32"], specs.ALL), *(("bfloat16", one) for one in LARGE)],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_retention_compiles_at_named_shapes(dtype, shape):
  """Forward and backward; what does not fit a multiprocessor is refused."""
  text = retention_gradient(mesh_of(), dtype, shape)
  assert text.count(KERNELS[dtype]) >= 4  # the forward pass and three gradients


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_retention_on_a_mesh_gathers_nothing(dtype):
  """Rows along one axis, heads along the other."""
  text = retention_gradient(mesh_of(rows=2, heads=2), dtype, SMALL, packed=True)
  assert text.count(KERNELS[dtype]) >= 4
  assert "all-gather" not in text and "all-to-all" not in text


def test_a_kernel_left_to_the_compiler_has_everything_gathered(monkeypatch):
  """So that the test before can fail."""
  monkeypatch.setattr(api, "divided", lambda function, *_, **__: function)
  text = retention_gradient(mesh_of(rows=2, heads=2), "bfloat16", SMALL)
  assert "all-gather" in text


@pytest.mark.parametrize("shape", [shape for shape in specs.DECODING if shape.b > 1])
def test_a_decoding_step_reads_and_writes_the_state_once(monkeypatch, shape):
  """A small state, of one row, is read again, out of the cache."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  from hlo_bytes import moved

  sharding = NamedSharding(mesh_of(), P())

  def array(sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

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
