"""A trace of a few training steps."""

from pathlib import Path
from typing import Any

import jax

FIRST, LAST = 10, 13  # steps after the start: compiled, and few enough to read


class Profiler:
  """Traces steps `FIRST + 1` to `LAST` after the start to `folder`, for TensorBoard or Perfetto."""

  def __init__(self, folder: Path, start_step: int, *, enabled: bool):
    self._folder, self._start_step = folder, start_step
    self._waits, self._traces = enabled, False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *exc_info) -> None:
    self._stop()

  def advance(self, step: int, metrics: Any) -> None:
    """Tells that `step` was started and will give `metrics`."""
    done = step - self._start_step
    if self._waits and done == FIRST:
      jax.block_until_ready(metrics)
      jax.profiler.start_trace(self._folder)
      self._waits, self._traces = False, True
    elif done == LAST:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self) -> None:
    if self._traces:
      jax.profiler.stop_trace()
      self._traces = False
      print(f"trace written to {self._folder}", flush=True)
