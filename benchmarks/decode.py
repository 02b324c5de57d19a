"""Time per token of decoding, against the bytes that must be read, and over a million positions.

    python benchmarks/decode.py [--json=FILE]

RetNet of 26 million parameters, float32, batch 1 and 32. Three questions, each answered by streams
that take turns:

- How near is a step to its bound? Every weight is read once (of the embedding only the rows of the
  tokens), the state read and written once; the bound is that over the bandwidth measured meanwhile.
- What does it gain that layers are unrolled, not scanned?
- Is a token at position 1,000,000 as cheap as one at position 1?
"""

import functools

import jax
import jax.numpy as jnp
import measure
import numpy as np
from flax import nnx

from triform.arch import build
from triform.arch.generation import decoding_step
from triform.arch.interface import state_bytes
from triform.arch.layout import split_model

BATCHES = {1: 24, 32: 6}  # and the tokens of a turn
ROUNDS = 9
FAR = 1_000_000
PROMPT = 256
PROBE = (8192, 8192)  # float32, 256 MiB: more than any cache holds


class Stream:
  """A model that decodes `batch` sequences, each token the likeliest one."""

  def __init__(self, batch: int, *, scan_layers: bool, prompt: int, position: int | None = None):
    model = build(measure.MODEL | {"scan_layers": scan_layers}, rngs=nnx.Rngs(0))
    graphdef, *weights = split_model(model)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt))
    logits, self.state = jax.jit(functools.partial(model, form="chunkwise"))(ids)
    self.token = jnp.argmax(logits[:, -1], axis=-1)
    if position is not None:
      self.state = jax.tree.map(
        lambda a: jnp.full_like(a, position) if a.dtype == jnp.uint32 else a, self.state
      )

    decode, self.weights = decoding_step(graphdef, weights, batch)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(weights, state, token):
      logits, state = decode(weights, state, token)
      return jnp.argmax(logits, axis=-1).astype(token.dtype), state

    self._step = step
    self.run(1)  # compiles

  def run(self, tokens: int) -> None:
    for _ in range(tokens):
      self.token, self.state = self._step(self.weights, self.state, self.token)
    self.token.block_until_ready()

  def bytes_per_step(self) -> int:
    params = dict(self.weights[0])
    table = params.pop("embedding")["embedding"]
    read = state_bytes(params) + len(self.token) * table[0].nbytes
    return read + 2 * state_bytes(self.state)


def bandwidth_probes():
  """Two ways through 256 MiB at full speed, and the bytes each moves."""
  matrix, vector = jnp.ones(PROBE), jnp.ones((1, PROBE[0]))
  product = jax.jit(jnp.dot)
  scale = jax.jit(lambda a: a * 0.5, donate_argnums=0)
  held = [jnp.ones(PROBE)]

  def read():
    product(vector, matrix).block_until_ready()

  def update():
    held[0] = scale(held[0]).block_until_ready()

  read(), update()
  return {"product": (read, matrix.nbytes), "update": (update, 2 * matrix.nbytes)}


def row(batch: int, tokens: int, rounds: int) -> dict:
  streams = {
    "unrolled": Stream(batch, scan_layers=False, prompt=PROMPT),
    "scanned": Stream(batch, scan_layers=True, prompt=PROMPT),
    "fresh": Stream(batch, scan_layers=False, prompt=1),
    "aged": Stream(batch, scan_layers=False, prompt=PROMPT, position=FAR),
  }
  probes = bandwidth_probes()
  runs = [functools.partial(stream.run, tokens) for stream in streams.values()]
  measured = measure.interleaved(runs + [f for f, _ in probes.values()], rounds)
  times = dict(zip([*streams, *probes], measured, strict=True))

  bandwidth = max(n / min(t.wall for t in times[name]) for name, (_, n) in probes.items())
  seconds = {name: measure.median(times[name]) / tokens for name in streams}
  best = min(t.wall for t in times["unrolled"]) / tokens
  moved = streams["unrolled"].bytes_per_step()
  return {
    "batch": batch,
    "seconds_per_token": seconds["unrolled"],
    "best_seconds_per_token": best,
    "scanned_seconds_per_token": seconds["scanned"],
    "speedup_over_scan": measure.ratio(times["scanned"], times["unrolled"]),
    "aged_over_fresh": measure.ratio(times["aged"], times["fresh"]),
    "positions": [1, FAR],
    "bytes_per_step": moved,
    "bandwidth": bandwidth,
    "bound_seconds": moved / bandwidth,
    "of_bound": moved / bandwidth / best,
    "cores": measure.cores(times["unrolled"]),
    "scanned_cores": measure.cores(times["scanned"]),
    "rounds": rounds,
  }


def main():
  parser = measure.parser(__doc__)
  parser.add_argument("--rounds", type=int, default=ROUNDS)
  options = parser.parse_args()
  rows = []
  for batch, tokens in BATCHES.items():
    rows.append(row(batch, tokens, options.rounds))
    found = rows[-1]
    print(
      f"batch {batch}: {found['seconds_per_token'] * 1e3:.2f} ms a token"
      f" (best {found['best_seconds_per_token'] * 1e3:.2f}, on {found['cores']:.2f} cores),"
      f" bound {found['bound_seconds'] * 1e3:.2f} ms"
      f" ({found['bytes_per_step'] / 1e6:.0f} MB at {found['bandwidth'] / 1e9:.1f} GB/s),"
      f" {found['speedup_over_scan']:.2f} times as fast as a scan,"
      f" aged over fresh {found['aged_over_fresh']:.3f}",
      flush=True,
    )
  measure.save(options.json, rows, measure.environment("jax", "flax"))


if __name__ == "__main__":
  main()
