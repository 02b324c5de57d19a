"""Memory of retention by length, as the compiler plans it: nothing is run.

    python benchmarks/retention_memory.py [--json=FILE]

Temporary bytes of a forward pass and of a gradient, batch 1, 8 heads of key size 64 and value
size 128, float32. The chunkwise form is linear in the length, the parallel form quadratic.
"""

import argparse
import json
import platform

import jax
import jax.numpy as jnp

from triform import kernels

HEADS, KEY, VALUE = 8, 64, 128


def temporary_bytes(form: str, t: int, *, backward: bool = False) -> int:
  """Bytes a compiled call needs beside its arguments and results."""

  def forward(q, k, v, log_decay):
    return kernels.retention(q, k, v, log_decay, form=form)

  def loss(*arrays):
    return sum(jnp.sum(a) for a in forward(*arrays))

  f = jax.grad(loss, argnums=(0, 1, 2, 3)) if backward else forward
  shapes = [(1, t, HEADS, KEY), (1, t, HEADS, KEY), (1, t, HEADS, VALUE), (HEADS,)]
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", help="file to write the rows to")
  options = parser.parse_args()
  where = {
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }
  shape = {"batch": 1, "heads": HEADS, "key_size": KEY, "value_size": VALUE, "dtype": "float32"}
  rows = []
  print(f"{'form':10} {'pass':9} {'tokens':>7} {'MiB':>9} {'bytes/token':>12}")
  for form, longest in (("chunkwise", 2**16), ("parallel", 2**14)):
    for backward in (False, True):
      tokens = 2**11
      while tokens <= longest:
        size = temporary_bytes(form, tokens, backward=backward)
        name = "backward" if backward else "forward"
        print(f"{form:10} {name:9} {tokens:7} {size / 2**20:9.1f} {size / tokens:12.0f}")
        rows.append(
          {"form": form, "pass": name, "tokens": tokens, "temp_bytes": size} | shape | where
        )
        tokens *= 2
  if options.json:
    with open(options.json, "w") as file:
      json.dump({"rows": rows}, file, indent=1)
      file.write("\n")


if __name__ == "__main__":
  main()
