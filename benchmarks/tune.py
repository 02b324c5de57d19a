"""Measures the layouts of the kernels of retention, and keeps those that win.

    python benchmarks/tune.py [--json=FILE]

On a TPU: how many chunks a grid step takes; on a Hopper GPU: how many columns of values a thread
block owns, and into how many pieces a sequence is cut. At the named shapes every choice takes turns
with the heuristic's, round by round; of shapes that look up the same entry the first is measured.
The heuristic's has two turns a round: what these differ by is the noise. A choice that is faster by
more than that is written to the table in which the kernels look, `kernels/retention/tuned.json`.
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from measure import Time, environment, interleaved, is_hopper, median, parser, ratio, save

from triform.kernels.retention import gpu_plan, gpu_sweep, specs, tpu, tpu_plan, tuned
from triform.kernels.retention.tpu_kernels import CHUNK

ROUNDS = 15
CALLS = 10  # in a turn, one right after another: their start is not what is measured
SMALLEST_PIECE = 8  # chunks
MOST_PIECES = 16

Choice = dict[str, int]
Run = Callable[[], Any]


class Case(NamedTuple):
  """What is measured for one entry of the table."""

  key: dict[str, Any]
  choices: list[Choice]  # the heuristic's first
  prepare: Callable[[], Callable[[Choice], Run]]  # makes arrays, then a program of every choice


def tpu_cases(
  shapes: Iterable[specs.Shape] = specs.ALL,
  dtypes: Iterable[str] = ("bfloat16", "float32"),
  interpret: bool = False,
) -> Iterator[Case]:
  for of in itertools.product(shapes, dtypes, (False, True), ("forward", "backward")):
    shape, dtype, packed, direction = of
    n = -(-shape.t // CHUNK)
    padded = [size + -size % CHUNK for size in (shape.k, shape.v)]
    key = tpu_plan.make_key(direction, dtype, packed, *padded, n)
    # Of a row the table knows no more than this divisor.
    chunks = dict.fromkeys([tpu_plan.heuristic(n), *tpu_plan.divisors(key["divisor"])])
    choices = [{"chunks": c} for c in chunks]
    yield Case(key, choices, functools.partial(_tpu_programs, *of, interpret))


def _tpu_programs(shape, dtype, packed, direction, interpret):
  b, t, h, k, v = shape
  arrays = [_normal(i, (b, t, h, size), dtype) for i, size in enumerate((k, k, v))]
  token = jnp.broadcast_to(jnp.arange(t), (b, t))
  reset, mask = (token % 1000 == 0, token % 1000 < 900) if packed else (None, None)

  def program(choice):
    def results(*arrays):
      decays = -jnp.ones(h) / 32
      return tpu.chunkwise(*arrays, decays, None, reset, mask, interpret=interpret, **choice)

    def loss(*arrays):
      return sum(jnp.sum(jnp.square(a.astype(jnp.float32))) for a in results(*arrays))

    f = jax.jit(results if direction == "forward" else jax.grad(loss, argnums=(0, 1, 2)))
    return lambda: f(*arrays)

  return program


def gpu_cases(shapes: Iterable[specs.Shape] = specs.ALL) -> Iterator[Case]:
  for b, t, h, *sizes in shapes:
    # The sweeps of `gpu`: outputs and the gradient of v, and the gradients of q and k, which are
    # float32 where that of decays is wanted.
    results = (sizes, "bfloat16"), (sizes[::-1], "bfloat16"), (sizes[::-1], "float32")
    for ((k, v), dtype), reverse in itertools.product(results, (False, True)):
      key = gpu_plan.make_key(b * h, t, k, v, dtype, reverse)
      sweep = functools.partial(_gpu_programs, b, t, h, k, v, dtype, reverse)
      yield Case(key, gpu_choices(b * h, t, k, v, jnp.dtype(dtype).itemsize), sweep)


def gpu_choices(heads: int, t: int, k: int, v: int, out_bytes: int) -> list[Choice]:
  chunks = t // gpu_plan.CHUNK
  pieces = gpu_sweep._pieces(heads * v // 64, chunks)
  plan = gpu_plan.make_plan(heads * pieces, k, v, out_bytes)
  choices = [{"tile": plan.tile, "pieces": pieces}]
  for tile, n in itertools.product(gpu_plan.TILES, (1, 2, 4, 8, MOST_PIECES)):
    try:
      gpu_plan.make_plan(heads * n, k, v, out_bytes, tile)
      gpu_plan.check_pieces(n, t)
    except ValueError:
      continue
    choice = {"tile": tile, "pieces": n}
    if choice not in choices and chunks // n >= SMALLEST_PIECE:
      choices.append(choice)
  return choices


def _gpu_programs(b, t, h, k, v, dtype, reverse):
  arrays = [_normal(i, (b, t, h, size), "bfloat16") for i, size in enumerate((k, k, v))]
  rate, state = -jnp.ones(h) / 32, jnp.zeros((b, h, k, v))

  def program(choice):
    sweep = functools.partial(gpu_sweep.sweep, reverse=reverse, out_dtype=dtype, **choice)
    f = jax.jit(lambda *arrays: sweep(*arrays, rate, None, None, state))
    return lambda: f(*arrays)

  return program


def _normal(seed, shape, dtype):
  return jax.random.normal(jax.random.key(seed), shape, dtype) / 4


def measure(runs: Sequence[Run]) -> list[list[Time]]:
  """Times of a call of each, by round, once all are compiled."""

  def turn(run):
    for _ in range(CALLS):
      result = run()
    jax.block_until_ready(result)

  for run in runs:
    turn(run)
  return interleaved([functools.partial(turn, run) for run in runs], ROUNDS)


def tune(
  case: Case, table: Path, device: str, measure: Callable[[Sequence[Run]], list[list[Time]]]
) -> list[dict[str, Any]]:
  """Measures a case and writes what won; a row of results per choice."""
  program = case.prepare()
  runs = [program(choice) for choice in case.choices]
  again, heuristic, *others = measure([runs[0], *runs])
  apart = [abs(a.wall / b.wall - 1) for a, b in zip(again, heuristic, strict=True)]
  noise = statistics.quantiles(apart, n=10)[-1]
  ratios = [1.0, *(ratio(times, heuristic) for times in others)]
  best = min(range(len(ratios)), key=ratios.__getitem__)
  won = ratios[best] < 1 - noise
  if won:
    entry = {"device": device, "key": case.key, "choice": case.choices[best]}
    tuned.write(table, entry | {"ratio": round(ratios[best], 3), "noise": round(noise, 3)})
  times = [heuristic, *others]
  return [
    {"key": case.key, "choice": choice, "ms": 1e3 * median(times[i]) / CALLS}
    | {"ratio": ratios[i], "noise": noise, "written": won and i == best}
    for i, choice in enumerate(case.choices)
  ]


def tune_all(cases: Iterable[Case], table: Path, device: str, measure=measure) -> list[dict]:
  rows, seen = [], []
  for case in cases:
    if case.key in seen or len(case.choices) == 1:
      continue
    seen.append(case.key)
    print(*(f"{name}={value}" for name, value in case.key.items()))
    for row in tune(case, table, device, measure):
      choice = ", ".join(f"{name}={value}" for name, value in row["choice"].items())
      told = "  written" if row["written"] else ""
      print(f"  {choice:20} {row['ms']:9.3f} ms {row['ratio']:6.3f}{told}", flush=True)
      rows.append(row)
    print(f"  noise {rows[-1]['noise']:.3f}")
  return rows


def cases_here(device: jax.Device) -> Iterator[Case]:
  if device.platform == "tpu":
    return tpu_cases()
  if is_hopper(device):
    return gpu_cases()
  sys.exit(f"Tuning needs a TPU or a Hopper GPU, JAX has found: {device.device_kind}.")


def main() -> None:
  options = parser(__doc__).parse_args()
  device = jax.local_devices()[0]
  rows = tune_all(cases_here(device), tuned.TABLE, device.device_kind)
  save(options.json, rows, environment("jax") | {"device": device.device_kind})
  print(f"{sum(row['written'] for row in rows)} entries written to {tuned.TABLE}")


if __name__ == "__main__":
  main()
