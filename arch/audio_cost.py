"""What a classifier of audio costs: memory, operations and their energy, time on one core."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from . import flops
from .accuracy import samples_of, tokens_of
from .interface import SequenceModule, sees_all, state_bytes
from .layers.audio import FULL_SCALE
from .layers.spiking import LIF
from .layout import split_model
from .models.lmuformer import LMUFormer
from .spiking import ACCUMULATE, MAC, Energy, energy

PIECE = 10.0  # milliseconds
INCLUDED = (
  "multiply-accumulates: products with what is real-valued, and batch norms, one for every "
  "element, where not folded; accumulates: additions of weights for spikes; the memory as a "
  "recurrence, the head once a clip; not the front end, biases, residuals, activations, updates of "
  "potentials and traffic to memory"
)


def sizes(model: SequenceModule, length: int) -> dict[str, int]:
  """The number of `parameters`, and the `state_bytes` of one sequence of `length` steps."""
  leaves = jax.tree.leaves(split_model(model)[1])
  tokens = tokens_of(model, length)
  state = jax.eval_shape(lambda: model.init_state(1, max_len=tokens))
  return {"parameters": sum(leaf.size for leaf in leaves), "state_bytes": state_bytes(state)}


def spikes(model: SequenceModule) -> bool:
  """Whether it has spiking neurons."""
  return any(isinstance(module, LIF) for _, module in nnx.iter_graph(model))


def clip_energy(
  model: LMUFormer, samples: int, rates: Mapping[str, float] | float
) -> dict[str, Any]:
  """The energy of a clip by the published convention, see `spiking.energy`, ready for JSON.

  Args:
    model: with a front end.
    samples: of the clip.
    rates: of spikes, as of `spiking.spike_rates`; `{}` for a plain model.
  """
  told, frames = _energy(model, samples, rates)
  macs, accumulates = _sums(told)
  return {
    "joules_per_clip": told.joules,
    "frames": frames,
    "multiply_accumulates": macs,
    "accumulates": accumulates,
    "updates": told.updates,
    "joules_of": {"multiply_accumulate": MAC, "accumulate": ACCUMULATE},
    "included": INCLUDED,
  }


def operations(
  model: SequenceModule, samples: int, rates: Mapping[str, float] | float | None = None
) -> dict[str, float | None]:
  """Operations for a second of audio, on average over a clip of `samples` with one answer.

  Those of an `LMUFormer` are those of its energy, see `clip_energy`. Of other models
  `multiply_accumulates` are half the floating-point operations in products and convolutions that
  have to be computed (`flops.count`, in the recurrent form if there is a state), `None` if one of
  its layers has no closed form. In either case the `front_end`, whose transform and filters are
  counted likewise, is not in them.

  Args:
    model: with a front end.
    samples: of the clip.
    rates: of spikes, for a spiking model.
  """
  per_second = model.front_end.analysis.sample_frequency / samples
  own = flops.Call(samples, "parallel" if sees_all(model) else "recurrent")
  front_end = flops.count(model.front_end, own).forward.flops / 2
  if isinstance(model, LMUFormer):
    macs, accumulates = _sums(_energy(model, samples, {} if rates is None else rates)[0])
  else:
    macs, accumulates = _products(model, own), 0
  return {
    "multiply_accumulates": None if macs is None else macs * per_second,
    "accumulates": accumulates * per_second,
    "front_end": front_end * per_second,
  }


def _products(model: SequenceModule, call: flops.Call) -> float | None:
  """Multiply-accumulates behind the front end."""
  try:
    whole = flops.count(model, call._replace(causal=not sees_all(model))).forward.flops
  except NotImplementedError:
    return None
  return (whole - flops.count(model.front_end, call).forward.flops) / 2


def _energy(model: LMUFormer, samples: int, rates) -> tuple[Energy, int]:
  frames = model.front_end.analysis.num_frames(samples)
  return energy(model, rates, frames=frames), frames


def _sums(told: Energy) -> tuple[float, float]:
  macs, accumulates = (sum(column) for column in zip(*told.layers.values(), strict=True))
  return macs, accumulates


def speed(
  model: SequenceModule, samples: int, *, rounds: int = 4, batch_size: int = 8
) -> dict[str, Any]:
  """How long audio takes, on one core of the CPU where the system lets a process choose.

  Args:
    model: with a front end.
    samples: of a clip.
    rounds: how often a clip, or a batch, is heard, after a first time that is not counted.
    batch_size: clips in a call of the parallel form.

  Returns:
    `device`; `cores`, 1 or all there are; `clips`, with the `batch_size` and `seconds_per_second`,
    of audio, of the parallel form on whole clips, the median over rounds; and `stream`, of a model
    with a state: microseconds for a piece of 10 ms in the recurrent form, the state carried, one
    stream, as `median` and `percentile_95`, `silent` if it is only listened to and `answering` with
    logits after each piece, as NumPy; and `real_time_factor`, the median time of a piece that is
    answered over its length.
  """
  with one_core() as cores:
    return {
      "device": jax.devices()[0].device_kind,
      "cores": cores,
      "stream": None if sees_all(model) else _stream(model, samples, rounds),
      "clips": _clips(model, samples, rounds, batch_size),
    }


@contextlib.contextmanager
def one_core() -> Iterator[int]:
  """Keeps all threads of this process on one core of those it has, where that can be (Linux).

  Yields:
    The number of cores there are now.
  """
  if not hasattr(os, "sched_setaffinity"):
    yield os.cpu_count() or 1
    return
  before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
  one = {min(os.sched_getaffinity(0))}
  _place({thread: one for thread in before})
  try:
    yield 1
  finally:
    had = before[threading.get_native_id()]  # of threads that were started meanwhile
    _place({thread: before.get(thread, had) for thread in _threads()})


def _threads() -> list[int]:
  return [int(path.name) for path in Path("/proc/self/task").iterdir()]


def _place(cores: Mapping[int, set[int]]) -> None:
  for thread, where in cores.items():
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
      os.sched_setaffinity(thread, where)


def _noise(rows: int, samples: int) -> np.ndarray:  # int16[rows, samples]
  level = 0.1 * FULL_SCALE
  return (level * np.random.default_rng(0).standard_normal((rows, samples))).astype(np.int16)


def _stream(model: SequenceModule, samples: int, rounds: int) -> dict[str, Any]:
  graphdef, params, variables = split_model(model)
  piece = samples_of(model, PIECE)
  audio = _noise(1, max(samples, piece))
  pieces = [audio[:, i : i + piece] for i in range(0, audio.shape[1] - piece + 1, piece)]

  def hear(answers: bool) -> list[float]:
    """Seconds of every piece of a clip."""
    state = model.init_state(1, max_len=tokens_of(model, audio.shape[1]))
    took = []
    jax.block_until_ready(state)
    for x in pieces:
      start = time.perf_counter()
      logits, state = _hear(graphdef, answers, params, variables, x, state)
      jax.tree.map(np.asarray, logits)
      jax.block_until_ready(state)
      took.append(time.perf_counter() - start)
    return took

  # In turns, as a neighbour slows whatever runs beside it.
  rounds_of = [(hear(False), hear(True)) for _ in range(rounds + 1)][1:]
  times = {}
  for name, took in zip(("silent", "answering"), zip(*rounds_of, strict=True), strict=True):
    micro = 1e6 * np.concatenate(took)
    times[name] = {
      "median": float(np.median(micro)),
      "percentile_95": float(np.percentile(micro, 95)),
    }
  return {**times, "real_time_factor": times["answering"]["median"] / (1000 * PIECE)}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _hear(graphdef, answers, params, variables, x, state):
  model = nnx.merge(graphdef, params, variables)
  if answers:
    return model(x, state, form="recurrent")
  return (), model.encode(x, state, form="recurrent")[1]


def _clips(model: SequenceModule, samples: int, rounds: int, batch_size: int) -> dict[str, Any]:
  graphdef, params, variables = split_model(model)
  audio = _noise(batch_size, samples)

  def hear():
    np.asarray(_call(graphdef, params, variables, audio))

  hear()
  seconds = batch_size * samples / model.front_end.analysis.sample_frequency
  took = np.median([_seconds(hear) for _ in range(rounds)])
  return {"batch_size": batch_size, "seconds_per_second": float(seconds / took)}


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef, params, variables, x):
  return nnx.merge(graphdef, params, variables)(x, form="parallel")[0]


def _seconds(f: Callable[[], Any]) -> float:
  start = time.perf_counter()
  f()
  return time.perf_counter() - start
