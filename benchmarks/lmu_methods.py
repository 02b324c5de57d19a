"""Time of a Legendre memory that is read, by form and method, forward and with its gradients.

    python benchmarks/lmu_methods.py [--rounds=5] [--json=FILE]

Order 256, window 128, one channel, read as 256 features, float32. `folded` reads the impulse
response in advance and never makes the memory; `apart` makes it and reads it. Best of the rounds,
which take turns. What is not worth a run is left out: a matrix of 16,384 x 16,384 inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from measure import environment, interleaved, median, parser, save

from triform.kernels import lmu

ORDER, THETA, FEATURES = 256, 128.0, 256
SHAPES = ((8, 128), (8, 784), (1, 16_384))  # rows, tokens
WAYS = {
  "gemm, folded": {"form": "parallel", "method": "gemm"},
  "gemm, apart": {"form": "parallel", "method": "gemm", "apart": True},
  "fft, folded": {"form": "parallel", "method": "fft"},
  "fft, apart": {"form": "parallel", "method": "fft", "apart": True},
  "chunkwise": {"form": "chunkwise"},
  "recurrent": {"form": "recurrent"},
}
LONGEST_PRODUCT = 2048


def program(b: int, t: int, *, apart: bool = False, **options):
  """Compiled functions, without arguments, of the outputs and of the gradients of their sum."""
  rng = np.random.default_rng(0)
  u = jnp.asarray(rng.normal(size=(b, t, 1)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(1, ORDER, FEATURES)) / 16, jnp.float32)

  def read(u, kernel):
    memory = {"order": ORDER, "theta": THETA, **options}
    if not apart:
      return lmu(u, kernel=kernel, **memory)[0]
    m, _ = lmu(u, **memory)
    return jnp.einsum("btdn,dno->bto", m, kernel)

  forward = jax.jit(read)
  backward = jax.jit(jax.grad(lambda u, kernel: jnp.sum(read(u, kernel) ** 2), (0, 1)))
  runs = [lambda f=f: jax.block_until_ready(f(u, kernel)) for f in (forward, backward)]
  for run in runs:
    run()
  return runs


def main() -> None:
  options = parser(__doc__)
  options.add_argument("--rounds", type=int, default=5)
  options = options.parse_args()
  rows = []
  print(f"{'rows x tokens':>14}  {'way':14} {'forward, ms':>12} {'gradients, ms':>14}")
  for b, t in SHAPES:
    names = [n for n, way in WAYS.items() if way.get("method") != "gemm" or t <= LONGEST_PRODUCT]
    programs = [program(b, t, **WAYS[name]) for name in names]
    times = interleaved([run for pair in programs for run in pair], options.rounds)
    for i, name in enumerate(names):
      best = [1e3 * min(t.wall for t in times[2 * i + k]) for k in (0, 1)]
      typical = [1e3 * median(times[2 * i + k]) for k in (0, 1)]
      print(f"{f'{b} x {t}':>14}  {name:14} {best[0]:12.1f} {best[1]:14.1f}")
      row = {"rows": b, "tokens": t, "way": name}
      rows.append(
        row
        | {"forward_ms": best[0], "gradients_ms": best[1]}
        | {"forward_median_ms": typical[0], "gradients_median_ms": typical[1]}
      )
  save(options.json, rows, environment("jax"))


if __name__ == "__main__":
  main()
