"""Programs compiled for an H100 that is not here, by JAX's CUDA plugin and ptxas without a driver."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
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
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.mark.parametrize("shape", specs.ALL)
def test_retention_compiles_at_named_shapes(shape):
  """Forward and backward; what does not fit a multiprocessor is refused."""
  devices = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
  ).devices
  sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), P())
  b, t, h, k, v = shape

  def array(sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  def loss(q, k, v, log_decay):
    out, state = kernels.retention(q, k, v, log_decay, implementation="gpu")
    return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(jnp.square(state))

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
  heads = [array((b, t, h, size)) for size in (k, k, v)]
  text = step.lower(*heads, array((h,), jnp.float32)).compile().as_text()
  assert text.count("mosaic_gpu") >= 4  # the forward pass and three gradients
