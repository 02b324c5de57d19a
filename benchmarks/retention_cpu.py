"""Time of chunkwise retention in XLA for CPU, against that of its matrix products alone.

    python benchmarks/retention_cpu.py [--rounds=9] [--json=FILE]

Keys of 256 and values of 432, float32, chunks of 128 tokens, a fixed decay per head. The products
are those of the algorithm, of arrays that lie as a product likes them best, [n, i, j]: per chunk
and head four forward and eight more backward. Ratios are medians over rounds of one's time over
the other's in the same round.
"""

import jax
import jax.numpy as jnp
import numpy as np
from measure import environment, interleaved, median, parser, ratio, save

from triform.kernels import retention
from triform.kernels.retention.specs import Shape

SHAPES = (Shape(4, 512, 3, 256, 432), Shape(1, 4096, 3, 256, 432))
CHUNK = 128


def passes(shape: Shape):
  """The outputs' sum of squares, and its gradients, of everything a layer differentiates."""
  b, t, h, k, v = shape
  rng = np.random.default_rng(0)
  sizes = ((b, t, h, k), (b, t, h, k), (b, t, h, v))
  arrays = [jnp.asarray(rng.normal(size=size) / 16, jnp.float32) for size in sizes]
  d_o = jnp.asarray(rng.normal(size=sizes[2]), jnp.float32)
  log_decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(h))))

  def forward(q, k, v):
    return retention(q, k, v, log_decay, chunk_size=CHUNK)[0]

  def backward(q, k, v):
    return jax.vjp(forward, q, k, v)[1](d_o)

  return [_runs(f, *arrays) for f in (forward, backward)]


def products(shape: Shape):
  """The same two passes, only the products."""
  b, t, h, k, v = shape
  n = b * h * t // CHUNK
  rng = np.random.default_rng(0)
  sizes = {"k": (n, CHUNK, k), "v": (n, CHUNK, v), "c": (n, CHUNK, CHUNK), "s": (n, k, v)}

  def pair(left, right):
    return [jnp.asarray(rng.normal(size=sizes[a]), jnp.float32) for a in (left, right)]

  # Scores, outputs within the chunk and from the state, what is added to the state; gradients of
  # the scores, and of q, k, v by these; of q and the state; of k and v by the next chunk's state.
  forward = [("nik,njk->nij", "kk"), ("nij,njv->niv", "cv"), ("nik,nkv->niv", "ks")]
  forward.append(("nik,niv->nkv", "kv"))
  backward = [("niv,njv->nij", "vv"), ("nij,njk->nik", "ck"), ("nij,nik->njk", "ck")]
  backward += [("nij,niv->njv", "cv"), ("niv,nkv->nik", "vs"), ("nik,niv->nkv", "kv")]
  backward += [("njv,nkv->njk", "vs"), ("njk,nkv->njv", "ks")]

  def all_of(equations):
    pairs = [pair(*names) for _, names in equations]
    return _runs(
      lambda pairs: [jnp.einsum(e, *p) for (e, _), p in zip(equations, pairs, strict=True)], pairs
    )

  return [all_of(forward), all_of(forward + backward)]


def _runs(f, *arrays):
  f = jax.jit(f)
  jax.block_until_ready(f(*arrays))
  return lambda: jax.block_until_ready(f(*arrays))


def main() -> None:
  options = parser(__doc__)
  options.add_argument("--rounds", type=int, default=9)
  options = options.parse_args()
  rows = []
  print(f"{'b,t,h,k,v':20} {'pass':20} {'ms':>8} {'products, ms':>13} {'ratio':>6}")
  for shape in SHAPES:
    times = interleaved([*passes(shape), *products(shape)], options.rounds)
    for i, name in enumerate(("forward", "forward, backward")):
      whole, alone = times[i], times[i + 2]
      row = {"shape": ",".join(map(str, shape)), "pass": name, "dtype": "float32"}
      row |= {"seconds": median(whole), "products": median(alone), "ratio": ratio(whole, alone)}
      rows.append(row)
      print(
        f"{row['shape']:20} {name:20} {1e3 * row['seconds']:8.1f} {1e3 * row['products']:13.1f} "
        f"{row['ratio']:6.2f}"
      )
  save(options.json, rows, environment("jax"))


if __name__ == "__main__":
  main()
