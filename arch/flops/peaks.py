"""Peak speeds of devices, which utilisation is measured against."""

import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 peaks from the makers' data sheets, FLOP/s per JAX device. The first name that a
# device's kind begins with counts; TPU v5p and v6e call themselves "TPU v5" and "TPU v6 lite".
KNOWN_PEAKS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def peak_flops(device: jax.Device) -> float:
  """Peak FLOP/s of a device: from the data sheet, or the best of a few products of matrices.

  The products are those that models are trained with: bfloat16 on an accelerator, and large enough
  to fill it, float32 on a CPU.
  """
  for kind, peak in KNOWN_PEAKS.items():
    if device.device_kind.startswith(kind):
      return peak
  n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
  return _measured_flops(device, n, dtype)


def _measured_flops(device: jax.Device, n: int, dtype: Any) -> float:
  a = jax.device_put(jnp.ones((n, n), dtype), device)
  product = jax.jit(jnp.dot)
  product(a, a).block_until_ready()
  seconds = []
  for _ in range(8):
    start = time.perf_counter()
    product(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * n**3 / min(seconds)
