"""The training loop."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from .. import flops, hosts
from ..caches import enable_compilation_cache
from ..interface import FORMS
from ..layout import to_stacked
from ..loading import InitialParameters, initial_parameters
from ..sharding import make_mesh
from ..vocabulary import load_vocabulary, save_vocabulary
from . import workdir as workdirs
from .best import Best
from .checkpoints import Checkpoints, has_checkpoint
from .config import LENGTHS
from .config_json import encode_config, flatten
from .metrics import MetricWriter
from .optimizer import schedule
from .profile import Profiler
from .program import make_program
from .signals import stop_signals
from .tasks import Task, task_of

_POSITIVE = (
  "seq_len",
  "batch_size",
  "accumulate",
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
  with contextlib.ExitStack() as held:
    with hosts.together():
      _check(config)
      if hosts.is_first():
        workdirs.check(workdir, config)
        held.enter_context(workdirs.lock(workdir))
    hosts.check_same("the configuration", json.dumps(encode_config(config)))
    return _train(config, Path(workdir), profile)


def _train(config: ConfigDict, workdir: Path, profile: bool) -> bool:
  if config.compilation_cache:
    enable_compilation_cache()
  with hosts.together():
    mesh = make_mesh(config.mesh)
    task, initial = _read(config, workdir)
    batches = task.batches(jax.process_index(), jax.process_count())
    total_steps = count_steps(config, batches.steps)
    program = make_program(config, mesh, total_steps)
    meter = _Meter(config, workdir, total_steps, mesh, task)
  hosts.check_same(*task.identity)

  with (
    Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    Best(workdir / "best", enabled=config.checkpoint.best) as best,
    stop_signals() as stopped,
  ):
    restored = checkpoints.restore_latest(program.stacked)
    start = 0 if restored is None else restored[0]
    first = hosts.is_first()
    if start >= total_steps:
      if first:
        print(
          f"{workdir} is trained to step {start} of {total_steps}, so there is nothing to do: give "
          "another --workdir for a new run, or more steps to go on"
        )
      return True
    with hosts.together():
      if first:  # and only now: a run that was mistyped must not keep the work directory for itself
        changes = workdirs.prepare(workdir, config)
        save_vocabulary(workdir, task.vocabulary)
        workdirs.write_parameter_table(workdir, program.abstract.params)
        if restored is not None:
          print(f"resuming {workdir} from step {start}", *changes, sep="\n  ", flush=True)
    if restored is None:
      state = program.init(None if initial is None else initial.leaves)
    else:
      state = program.from_stacked(restored[1])

    with (
      MetricWriter(workdir, total_steps=total_steps, start_step=start, enabled=first) as writer,
      Profiler(workdir / "profile", start, enabled=profile and first) as profiler,
      contextlib.closing(batches.iterate(start)) as upcoming,
    ):

      def validate(step: int):
        result = task.evaluate(program.model(state))
        writer.write(step, {f"eval_{name}": result[name] for name in task.evaluated})
        best.offer(step, result["loss"], state)

      batch = next(upcoming)
      placed = program.put(batch)
      last = None  # of the step before, read while the device works on this one
      step = start
      while step < total_steps and not _stops(config, step, stopped.is_set()):
        state, metrics = program.step(state, placed, np.int32(step))
        step += 1
        if last is not None:
          meter.read(writer, *last)
        last = step, batch, metrics
        batch = next(upcoming)
        placed = program.put(batch)
        profiler.advance(step, metrics)
        evaluates = step % config.eval.every_steps == 0 or step == total_steps
        keeps = step % config.checkpoint.every_steps == 0 or step == total_steps
        if evaluates or keeps:
          meter.read(writer, *last)  # a state is kept only if its step was finite
          last = None
          with meter.paused():
            if keeps:
              checkpoints.save(step, to_stacked(state))
            if evaluates:
              validate(step)
      if last is not None:
        meter.read(writer, *last)
      checkpoints.save(step, to_stacked(state))
  return step == total_steps


def _read(config: ConfigDict, workdir: Path) -> tuple[Task, InitialParameters | None]:
  """The task of a run, and the parameters that it starts from, unless these are random or its own.

  A resumed run keeps its tokenizer, even where the corpus has changed with the Python version;
  one that starts from another's parameters keeps the ids they know.
  """
  vocabulary, initial = None, None
  if has_checkpoint(workdir / "checkpoints"):
    vocabulary = load_vocabulary(workdir)
  elif config.init_from is not None:
    initial = initial_parameters(config.init_from, config.model)
    vocabulary = initial.vocabulary
  return task_of(config.model.architecture)(config, vocabulary), initial


def _stops(config: ConfigDict, step: int, asked: bool) -> bool:
  """Whether to stop after `step` steps: at once, or with all other processes when they log."""
  if jax.process_count() > 1:
    return step % config.log_every_steps == 0 and hosts.total(asked) > 0
  return asked


def count_steps(config: ConfigDict, steps_of_epochs: Callable[[float], int]) -> int:
  """The steps of a run."""
  name, length = _length(config)
  if name == "total_tokens":
    return max(math.ceil(length / (config.batch_size * config.seq_len)), 1)
  return steps_of_epochs(length) if name == "total_epochs" else length


def _length(config: ConfigDict) -> tuple[str, float]:
  given = [(name, config[name]) for name in LENGTHS if config.get(name) is not None]
  if len(given) != 1:
    told = " and ".join(f"{name}={length}" for name, length in given) or "nothing"
    raise ValueError(f"the length of the run is {told}, expected one of {', '.join(LENGTHS)}")
  ((name, length),) = given
  if not length > 0:
    raise ValueError(f"{name} is {length}, expected more than 0")
  return name, length


class _Meter:
  """Reads metrics of finished steps, checks them, and turns them into rates."""

  def __init__(self, config: ConfigDict, workdir: Path, total_steps: int, mesh: Mesh, task: Task):
    self._config, self._workdir, self._task = config, workdir, task
    self._total_steps = total_steps
    self._schedule = schedule(config.optimizer, total_steps)
    self._flops_per_unit = task.flops_per_unit()
    self._peak = (config.peak_flops or flops.peak_flops(mesh.local_devices[0])) * mesh.size
    self._units, self._since = 0, None

  def read(self, writer: MetricWriter, step: int, batch: dict, metrics: dict):
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not metrics["finite"]:
      self._stop(step, batch, metrics)
    writer.advance(step)
    now = time.perf_counter()
    if self._since is None:  # the first step compiles
      self._since = now
    else:
      self._units += batch["targets"].size * jax.process_count()
    if step % self._config.log_every_steps and step != self._total_steps:
      return
    record = {
      **self._task.measures(batch, metrics),
      "learning_rate": float(self._schedule(step - 1)),
      "gradient_norm": metrics["gradient_norm"],
    }
    if self._units:
      rate = self._units / (now - self._since)
      achieved = rate * self._flops_per_unit
      record |= {
        f"{self._task.unit}_per_second": rate,
        "model_flops_per_second": achieved,
        "mfu": achieved / self._peak,
      }
      self._units, self._since = 0, now
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
    if hosts.is_first():
      workdirs.write_atomically(path, json.dumps(identity) + "\n")
    raise NonFiniteError(
      f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; "
      f"the batch is in {path}"
    )


def _check(config: ConfigDict) -> None:
  fields = flatten(config)
  for name in _POSITIVE:
    if name in fields and fields[name] < 1:  # each task has its own
      raise ValueError(f"{name} is {fields[name]}, expected at least 1")
  _length(config)
  for name in ("form", "eval.form"):
    if fields[name] not in FORMS:
      raise ValueError(f"{name} is {fields[name]!r}, expected one of {', '.join(FORMS)}")
