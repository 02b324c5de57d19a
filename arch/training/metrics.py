"""Where the numbers of a run go: a JSON lines file, TensorBoard, and the terminal."""

import json
import math
import os
import sys
import time
from pathlib import Path

import tensorboardX
import tqdm

from .workdir import write_atomically


class MetricWriter:
  """Writes scalars to `metrics.jsonl`, to `tensorboard/`, and to the terminal.

  On a terminal there is a progress bar with the latest numbers, and evaluations (any metric
  whose name starts with `eval_`) stay above it; elsewhere every call of `write` prints a line.

  A run that was killed has logged steps after its last checkpoint. When it is resumed from
  there, these are dropped from the file (with a line that was cut short) and hidden in
  TensorBoard, so that the steps that are run again appear once.

  Args:
    workdir: an existing folder.
    total_steps: the step at which the run ends, for the progress bar and the time left.
    start_step: the step the run continues from, 0 for a new one.
    enabled: write anything; of several processes only one does.
  """

  def __init__(
    self, workdir: str | os.PathLike, *, total_steps: int, start_step: int, enabled: bool = True
  ):
    self._enabled = enabled
    if not enabled:
      return
    path = Path(workdir) / "metrics.jsonl"
    if path.exists():
      write_atomically(path, _without_lost_steps(path.read_text(), start_step))
    self._total_steps = total_steps
    self._file = path.open("a")
    self._tensorboard = tensorboardX.SummaryWriter(
      str(Path(workdir) / "tensorboard"), purge_step=start_step + 1, flush_secs=10
    )
    self._bar = None
    if sys.stdout.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps, initial=start_step, file=sys.stdout, unit="step", dynamic_ncols=True
      )
    self._first = None

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def close(self) -> None:
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.close()
    self._tensorboard.close()
    self._file.close()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Records `metrics` of `step` everywhere. Values are Python, NumPy or JAX scalars."""
    if not self._enabled:
      return
    self.advance(step)
    shown = {name: float(value) for name, value in metrics.items()}
    metrics = shown | self._eta(step)
    line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
    self._file.write(json.dumps({"step": step, **line}) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      self._tensorboard.add_scalar(name, value, step)
    if self._bar is None:
      print(format_line(step, self._total_steps, metrics), flush=True)
    elif any(name.startswith("eval_") for name in metrics):
      self._bar.write(format_line(step, self._total_steps, shown), file=sys.stdout)
    else:
      self._bar.set_postfix_str(_format_metrics(shown))  # the bar has its own time left

  def advance(self, step: int) -> None:
    """Tells that `step` is done; cheap enough for every step."""
    if not self._enabled:
      return
    if self._first is None:
      self._first = step, time.monotonic()
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def _eta(self, step: int) -> dict[str, float]:
    # Counted from the end of the first step, which includes compilation.
    first_step, first_time = self._first
    if not first_step < step < self._total_steps:
      return {}
    per_step = (time.monotonic() - first_time) / (step - first_step)
    return {"eta": per_step * (self._total_steps - step)}


def format_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
  """A log line: `step 100/2000  loss 2.314  tokens_per_second 21,300  mfu 41%  eta 3m10s`.

  `mfu` is a fraction and `eta` a number of seconds; other values have four significant digits, or
  all before the point.
  """
  return f"step {step}/{total_steps}  {_format_metrics(metrics)}"


def _format_metrics(metrics: dict[str, float]) -> str:
  return "  ".join(f"{name} {_format_value(name, value)}" for name, value in metrics.items())


def _format_value(name: str, value: float) -> str:
  if not math.isfinite(value):
    return str(value)
  if name == "mfu":
    return f"{value:.0%}"
  if name == "eta":
    return _format_duration(round(value))
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _format_duration(seconds: int) -> str:
  minutes, seconds = divmod(seconds, 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days}d{hours:02}h"
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _without_lost_steps(text: str, start_step: int) -> str:
  kept = []
  for line in text.splitlines():
    try:
      if json.loads(line)["step"] <= start_step:
        kept.append(line + "\n")
    except json.JSONDecodeError:
      pass  # the process was killed while it wrote this line
  return "".join(kept)
