"""The training loop."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from .. import flops
from ..data.packing import train_batches
from ..data.text import load_text
from ..data.tokenizers import load_tokenizer
from ..evaluation import bits_per_byte, evaluate
from ..interface import FORMS
from ..layout import from_stacked, split_model, to_stacked
from ..models import build
from . import workdir as workdirs
from .checkpoints import Checkpoints
from .metrics import MetricWriter
from .optimizer import optimizer, schedule
from .step import TrainState, make_train_step

_POSITIVE = (
  "seq_len",
  "batch_size",
  "total_steps",
  "log_every_steps",
  "eval.every_steps",
  "eval.seq_len",
  "eval.batch_size",
  "checkpoint.every_steps",
  "checkpoint.keep",
)


class NonFiniteError(FloatingPointError):
  """The loss or the update of a step was not finite."""


def train(config: ConfigDict, workdir: str | os.PathLike, *, profile: bool = False) -> bool:
  """Trains the model of `config` in `workdir`, or goes on where an earlier run there stopped.

  The state after step n is a function of the configuration and n alone, so a run that was
  stopped and resumed ends like one that was not. SIGTERM and SIGINT save a checkpoint and stop.

  Args:
    config: as `arch.training.config.default_config` has it.
    workdir: where everything about the run is kept.
    profile: write a trace of a few steps, for TensorBoard or Perfetto, to `workdir/profile`.

  Returns:
    Whether all steps are done; false if a signal stopped the run.

  Raises:
    ValueError: for a configuration that cannot be run, before any training.
    NonFiniteError: when a loss or update is not finite; `nonfinite.json` in the work
      directory tells the step and its batch, and the state before it is the last one kept.
  """
  _check(config)
  workdir = Path(workdir)
  if config.compilation_cache:
    enable_compilation_cache()
  mesh = make_mesh(config.mesh)
  workdirs.prepare(workdir, config)
  # A resumed run keeps its tokenizer, even where the corpus has changed with the Python version.
  tokenizer_folder = workdir / "tokenizer"
  tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder.exists() else None
  data = load_text(config.data, config.model.vocab_size, tokenizer)
  data.tokenizer.save(tokenizer_folder)
  special = {"bos_id": data.tokenizer.bos_id, "eos_id": data.tokenizer.eos_id}
  batches = train_batches(
    data.train, **special, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
  )
  total_steps = count_steps(config, steps_per_epoch=1)

  program = make_program(config, mesh, total_steps)
  workdirs.write_parameter_table(workdir, program.abstract.params)
  meter = _Meter(config, workdir, total_steps, mesh, data.tokenizer.token_bytes)

  with (
    Checkpoints(
      workdir / "checkpoints", every_steps=config.checkpoint.every_steps, keep=config.checkpoint.keep
    ) as checkpoints,
    _Best(workdir / "best", config.checkpoint.best) as best,
    stop_signals() as stopped,
  ):
    restored = checkpoints.restore_latest(program.stacked)
    if restored is None:
      start, state = 0, program.init()
    else:
      start, leaves = restored
      state = program.from_stacked(leaves)
      print(f"resuming {workdir} from step {start}", flush=True)

    def validate(step: int):
      options = {k: v for k, v in config.eval.items() if k != "every_steps"}
      result = evaluate(program.model(state), data.validation, data.tokenizer, **options)
      names = ("loss", "perplexity", "bits_per_byte")
      writer.write(step, {f"eval_{name}": result[name] for name in names})
      best.offer(step, result["loss"], state)

    def read(last):
      if last is not None:
        meter.read(writer, *last)

    with (
      MetricWriter(workdir, total_steps=total_steps, start_step=start) as writer,
      _Profiler(workdir / "profile", start, enabled=profile) as profiler,
    ):
      last = None  # of the step before, read while the device works on this one
      step = start
      while step < total_steps and not stopped:
        batch = batches[step]
        state, metrics = program.step(state, program.put(batch), np.int32(step))
        step += 1
        read(last)
        last = (step, batch, metrics)
        evaluates = step % config.eval.every_steps == 0 or step == total_steps
        keeps = step % config.checkpoint.every_steps == 0
        if evaluates or keeps:
          read(last)
          last = None
        with meter.paused():
          if evaluates:
            validate(step)
          if keeps:
            checkpoints.save(step, to_stacked(state))
        profiler.advance(step, metrics)
      read(last)
      checkpoints.save(step, to_stacked(state), force=True)
  return step == total_steps


def count_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """The steps of a run: `total_tokens` or `total_epochs` if one is given, else `total_steps`."""
  if config.total_tokens is not None and config.total_epochs is not None:
    raise ValueError("total_tokens and total_epochs are both given, expected at most one")
  if config.total_tokens is not None:
    return max(math.ceil(config.total_tokens / (config.batch_size * config.seq_len)), 1)
  if config.total_epochs is not None:
    return max(math.ceil(config.total_epochs * steps_per_epoch), 1)
  return config.total_steps


class _Meter:
  """Reads metrics of finished steps, checks them, and turns them into rates."""

  def __init__(self, config: ConfigDict, workdir: Path, token_bytes: np.ndarray):
    self._config, self._workdir, self._token_bytes = config, workdir, token_bytes
    self._schedule = schedule(config.optimizer, config.total_steps)
    self._flops_per_token = flops.train_flops_per_token(config.model, config.seq_len, config.form)
    self._peak = config.peak_flops or flops.peak_flops(jax.devices()[0])
    self._tokens, self._since = 0, None

  def read(self, writer: MetricWriter, step: int, batch: dict, metrics: dict):
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not metrics["finite"]:
      self._stop(step, batch, metrics)
    writer.advance(step)
    now = time.perf_counter()
    if self._since is None:  # the first step compiles
      self._since = now
    else:
      self._tokens += batch["inputs"].size
    if step % self._config.log_every_steps and step != self._config.total_steps:
      return
    text_bytes = int(self._token_bytes[batch["targets"]][batch["mask"]].sum())
    record = {
      "loss": metrics["loss"],
      "bits_per_byte": bits_per_byte(metrics["total_loss"], text_bytes),
      "learning_rate": float(self._schedule(step - 1)),
      "gradient_norm": metrics["gradient_norm"],
    }
    if self._tokens:
      rate = self._tokens / (now - self._since)
      achieved = rate * self._flops_per_token
      record |= {
        "tokens_per_second": rate,
        "model_flops_per_second": achieved,
        "mfu": achieved / self._peak,
      }
      self._tokens, self._since = 0, now
    writer.write(step, record)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out of the rates the time spent inside."""
    start = time.perf_counter()
    yield
    if self._since is not None:
      self._since += time.perf_counter() - start

  def _stop(self, step: int, batch: dict, metrics: dict):
    identity = {
      "step": step,
      "seed": self._config.seed,
      **{name: str(value) for name, value in metrics.items()},
      "inputs": batch["inputs"].tolist(),
    }
    path = self._workdir / "nonfinite.json"
    workdirs.write_atomically(path, json.dumps(identity) + "\n")
    raise NonFiniteError(
      f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; "
      f"the batch is in {path}"
    )


def _check(config: ConfigDict) -> None:
  fields = workdirs.flatten(config)
  for name in _POSITIVE:
    if fields[name] < 1:
      raise ValueError(f"{name} is {fields[name]}, expected at least 1")
  for name in ("form", "eval.form"):
    if fields[name] not in FORMS:
      raise ValueError(f"{name} is {fields[name]!r}, expected one of {', '.join(FORMS)}")


def enable_compilation_cache() -> None:
  folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "triform" / "xla"
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class _Stopped:
  def __init__(self):
    self.signal: int | None = None

  def __bool__(self):
    return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[_Stopped]:
  """True once SIGTERM or SIGINT has come; the second one acts as it would have by default."""
  stopped = _Stopped()
  previous: dict[int, Any] = {}

  def handle(number, _):
    stopped.signal = number
    signal.signal(number, previous[number])

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, handle)
  try:
    yield stopped
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
