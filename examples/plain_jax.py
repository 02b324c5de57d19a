"""Retention from plain JAX, with parameters in a dictionary and no Flax at all.

`triform.kernels` has pure functions of arrays: the mixing itself, positions and the head norm.

    python examples/plain_jax.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from triform import kernels

HEADS, SIZE = 4, 16
WIDTH = HEADS * SIZE
LOG_DECAY = jnp.log(1 - 2.0 ** (-5 - jnp.arange(HEADS)))
ANGLES = 10000.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))


def init(key):
  keys = jax.random.split(key, 4)
  return {
    name: jax.random.normal(key, (WIDTH, WIDTH)) * WIDTH**-0.5
    for name, key in zip(("query", "key", "value", "output"), keys, strict=True)
  }


def mix(params, x, state, reset=None, form="parallel"):
  """[b, t, WIDTH] to the same; the state is a sum of decayed products of k and v, and positions."""
  kv, start = state
  q, k, v = (
    (x @ params[name]).reshape(*x.shape[:2], HEADS, SIZE) for name in ("query", "key", "value")
  )
  position, seen = kernels.token_positions(start, reset, None, x.shape[1])
  phase = kernels.rotary_phase(position, jnp.asarray(kernels.rotary_steps(ANGLES)))
  q, k = kernels.rotate(q, phase), kernels.rotate(k * SIZE**-0.5, phase)
  o, kv = kernels.retention(q, k, v, LOG_DECAY, state=kv, reset=reset, form=form)
  o = kernels.head_norm(o, position, LOG_DECAY, eps=1e-6)
  return o.reshape(x.shape) @ params["output"], (kv, seen)


def main(length: int = 300):
  params = init(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, length, WIDTH))
  empty = jnp.zeros((2, HEADS, SIZE, SIZE)), jnp.zeros(2, jnp.uint32)
  call = jax.jit(mix, static_argnames="form")
  forms = ("parallel", "chunkwise", "recurrent")
  outputs = {form: call(params, x, empty, form=form)[0] for form in forms}
  for form, y in outputs.items():
    difference = jnp.abs(y - outputs["parallel"]).max()
    print(f"{form}: differs from parallel by at most {difference:.1e}")

  middle = length // 2
  reset = jnp.zeros((2, length), bool).at[:, middle].set(True)
  packed, _ = call(params, x, empty, reset, form="chunkwise")
  alone, _ = call(params, x[:, middle:], empty, form="chunkwise")
  leak = jnp.abs(packed[:, middle:] - alone).max()
  print(f"two documents in a row: the second differs from itself alone by at most {leak:.1e}")
  print(f"Flax is loaded: {'flax' in sys.modules}")
  return outputs, leak


if __name__ == "__main__":
  main()
