"""The GPU kernel of retention in JAX's interpreter of Mosaic GPU; prints errors as JSON.

Waiting warpgroups block XLA's threads on the CPU, of which there have to be more: `NPROC=32`.
"""

import functools
import json
import sys

import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np

from triform import kernels
from triform.kernels.retention import gpu

gpu_interpreter.install()
try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
# Before JAX 0.11 the race detector hangs.
PARAMS = InterpretGPUParams(detect_races=not gpu_interpreter.OLD)
NAMES = ("out", "state", "d_q", "d_k", "d_v", "d_log_decay", "d_state")


def errors(t, h, g, k, v, *, packed, per_token):
  """Relative errors against the recurrent form in float64: the kernel's, and that form's."""
  rng = np.random.default_rng(0)
  shapes = [(2, t, h, k), (2, t, g, k), (2, t, g, v)]
  heads = [jnp.asarray(rng.normal(size=shape) / 4, jnp.bfloat16) for shape in shapes]
  decays = -0.1 * np.abs(rng.normal(size=(2, t, h) if per_token else (h,)))
  arrays = (*heads, np.float32(decays), np.float32(rng.normal(size=(2, h, k, v))))
  reset = mask = None
  if packed:
    reset, mask = rng.random((2, t)) < 0.03, rng.random((2, t)) < 0.8
  real = np.ones((2, t), bool) if mask is None else mask
  weights = [
    rng.normal(size=(2, t, h, v)) * real[..., None, None],
    rng.normal(size=(2, h, k, v)),
  ]

  def results(f, arrays):
    (out, after), backward = jax.vjp(lambda *arrays: f(*arrays, reset, mask), *arrays)
    cotangents = [jnp.asarray(w, a.dtype) for w, a in zip(weights, (out, after), strict=True)]
    return [np.asarray(out, np.float64)[real], after, *backward(tuple(cotangents))]

  def plain(q, k, v, log_decay, state, reset, mask):
    return kernels.retention(
      *(q, k, v, log_decay), state=state, reset=reset, mask=mask, form="recurrent"
    )

  def kernel(q, k, v, log_decay, state, reset, mask):
    if mask is not None:
      q, k, v = (jnp.where(mask[..., None, None], a, 0) for a in (q, k, v))
      log_decay = jnp.where(mask[..., None], log_decay, 0) if per_token else log_decay
    return gpu.chunkwise(q, k, v, log_decay, state, reset, mask, interpret=PARAMS)

  got, simplest = results(kernel, arrays), results(jax.jit(plain), arrays)
  with jax.enable_x64():
    truth = results(jax.jit(plain), tuple(np.asarray(a, np.float64) for a in arrays))

  def error(one, expected):
    one, expected = np.asarray(one, np.float64), np.asarray(expected)
    return float(np.linalg.norm(one - expected) / np.linalg.norm(expected))

  rows = zip(NAMES, got, simplest, truth, strict=True)
  return {name: (error(one, exact), error(other, exact)) for name, one, other, exact in rows}


CASES = {
  "packed": functools.partial(errors, 150, 2, 1, 64, 64, packed=True, per_token=False),
  "per token": functools.partial(errors, 128, 1, 1, 100, 64, packed=False, per_token=True),
  "in pieces": functools.partial(errors, 1024, 1, 1, 64, 64, packed=False, per_token=False),
}

if __name__ == "__main__":
  print(json.dumps(CASES[sys.argv[1]]()))
