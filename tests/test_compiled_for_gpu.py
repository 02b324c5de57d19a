"""Programs compiled for an H100 that is not here: JAX's CUDA plugin and ptxas need no driver."""

import importlib.util
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
H100 = (Path(__file__).parents[1] / "benchmarks/h100.txtpb").read_text()


# Pallas-Triton wants to know for what, from JAX 0.11.2 on.
DEVICE = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", specs.ALL)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_retention_compiles_at_named_shapes(shape, dtype):
  """Forward and backward; what does not fit a multiprocessor is refused."""
  devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
  ).devices
  sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), P())
  b, t, h, k, v = shape

  def array(sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

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
