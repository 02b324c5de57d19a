"""What the benchmarks of time share: the machine, the clock, interleaved rounds, kept results.

A neighbour on the same cores slows whatever runs beside it, so what is compared takes turns, round
by round, and processor time stands beside wall time: their ratio is the cores that one really had.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The model of the benchmarks of speed: 26,221,056 parameters, 24.1 million of them in products.
MODEL = {
  "architecture": "retnet",
  "vocab_size": 4096,
  "d_model": 512,
  "num_layers": 6,
  "num_heads": 2,
  "value_dim": 1024,
  "ffn_dim": 1024,
}


class Time(NamedTuple):
  """Seconds on the wall, and of processor over all threads."""

  wall: float
  processor: float


def timed(f: Callable[[], Any]) -> Time:
  """Runs `f`, which must wait for its own result."""
  wall, processor = time.perf_counter(), time.process_time()
  f()
  return Time(time.perf_counter() - wall, time.process_time() - processor)


def interleaved(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[Time]]:
  """Times of every function: each once a round, in an order that turns round every time."""
  times = [[] for _ in runs]
  for n in range(rounds):
    order = range(len(runs)) if n % 2 == 0 else reversed(range(len(runs)))
    for i in order:
      times[i].append(timed(runs[i]))
  return times


def median(times: Sequence[Time]) -> float:
  return statistics.median(t.wall for t in times)


def cores(times: Sequence[Time]) -> float:
  """Processor time over wall time."""
  return sum(t.processor for t in times) / sum(t.wall for t in times)


def ratio(slow: Sequence[Time], fast: Sequence[Time]) -> float:
  """The median over rounds of one's time over the other's in the same round."""
  return statistics.median(a.wall / b.wall for a, b in zip(slow, fast, strict=True))


def is_hopper(device: Any) -> bool:
  """Whether a JAX device is one that the GPU kernels are for."""
  return device.platform == "gpu" and device.compute_capability == "9.0"


def told(error: Exception) -> str:
  """Its kind and first line."""
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:200]}"


def parser(doc: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument("--json", help="file to write the rows to")
  return parser


def environment(*packages: str) -> dict[str, str]:
  """The machine, and versions of Python and `packages`."""
  processor = platform.processor() or platform.machine()
  for line in _read("/proc/cpuinfo").splitlines():
    if line.startswith("model name"):
      processor = line.partition(":")[2].strip()
      break
  versions = {name: importlib.metadata.version(name) for name in packages}
  device = f"{processor}, {os.cpu_count()} cores"
  return {"device": device, "python": platform.python_version(), **versions}


def save(path: str | None, rows: list[dict], environment: dict[str, str]) -> None:
  if path is not None:
    Path(path).write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


def _read(path: str) -> str:
  return Path(path).read_text() if Path(path).exists() else ""
