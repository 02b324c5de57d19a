"""How often a classifier is right: by class, by confidence, by how much it heard, and on noise.

All of it is of logits `[n, classes]`, computed once for each example (`class_logits`); confidences
are `softmax(logits)`, whatever the objective was.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import log_softmax, softmax

from .data.batches import Rows
from .data.packing import check_positive
from .evaluation import padded_batch, wilson_interval
from .interface import Form, SequenceModule, sees_all
from .layers.audio import FULL_SCALE
from .layout import split_model

COLOURS = {"white": 0, "pink": 1, "brown": 2}  # noise whose power falls as 1 / f^n
LOWEST_PITCH = 20.0  # hertz, below which noise has nothing: of brown noise it would be nearly all
LEVELS = -60.0, -20.0  # decibels of full scale
FIRST_HEARD = 100.0  # milliseconds


def class_logits(
  model: SequenceModule,
  examples: Rows,
  *,
  step: int | None = None,
  form: Form = "chunkwise",
  batch_size: int = 100,
) -> tuple[np.ndarray, np.ndarray]:  # float64[1 + prefixes, n, classes], int[n]
  """Logits of all examples and their classes, of prefixes first and of all that there is last.

  Prefixes are the first `step`, `2 step`, ... steps, or samples, while that is less than all. A
  model with a state hears the sequence once, in pieces, and answers after each; one that sees whole
  sequences is called for every prefix. What an example's `mask` leaves out stays unheard, so that
  a shorter sequence is heard whole by all the prefixes that reach its end.

  Args:
    model: maps `[b, t, ...]` to logits `[b, classes]`; for prefixes a `Classifier`.
    examples: see `training.tasks.classification.LabelledData`.
    step: of the prefixes; none by default.
    form: the algorithm.
    batch_size: examples in a call.

  Raises:
    ValueError: if there is no example, or a size is below 1.
  """
  check_positive(batch_size=batch_size, **({} if step is None else {"step": step}))
  if not len(examples):
    raise ValueError("there is no example to evaluate on")
  graphdef, params, variables = split_model(model)
  logits, targets = [], []
  for start in range(0, len(examples), batch_size):
    indices = range(start, min(start + batch_size, len(examples)))
    batch = padded_batch(examples, indices, batch_size)
    x, mask = batch["inputs"], batch.get("mask")
    found = [_whole(graphdef, form, params, variables, x, mask)[None]]
    if step is not None and step < x.shape[1]:
      found.insert(0, _prefixes(graphdef, form, step, params, variables, x, mask))
    logits.append(np.concatenate(found).astype(np.float64)[:, : len(indices)])
    targets.append(batch["targets"][: len(indices)])
  return np.concatenate(logits, axis=1), np.concatenate(targets)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _whole(graphdef, form, params, variables, x, mask):
  return nnx.merge(graphdef, params, variables)(x, form=form, mask=mask)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefixes(graphdef, form, step, params, variables, x, mask):
  """Logits `[prefixes, b, classes]`."""
  model = nnx.merge(graphdef, params, variables)
  (b, n), count = x.shape[:2], (x.shape[1] - 1) // step
  if sees_all(model):
    index = jnp.arange(n)[None]
    mask = jnp.ones((b, n), bool) if mask is None else mask
    ends = step * jnp.arange(1, count + 1)
    return jax.lax.map(lambda end: model(x, form=form, mask=mask & (index < end))[0], ends)

  def hear(state, piece):
    _, state = model.encode(piece[0], state, form=form, mask=piece[1])
    return state, model.read_out(state)

  pieces = jax.tree.map(
    lambda a: jnp.moveaxis(a[:, : count * step].reshape(b, count, step, *a.shape[2:]), 1, 0),
    (x, mask),
  )
  return jax.lax.scan(hear, model.init_state(b, max_len=tokens_of(model, n)), pieces)[1]


def tokens_of(model: SequenceModule, steps: int) -> int:
  """At most so many tokens are made of a sequence of so many steps, or samples."""
  front_end = getattr(model, "front_end", None)
  return steps if front_end is None else front_end.num_frames(steps, True)


def measures(
  logits: np.ndarray,  # [n, classes]
  targets: np.ndarray,  # int[n]
  labels: Sequence[str],
) -> dict[str, Any]:
  """What a classifier's answers are worth, ready for JSON.

  Returns:
    `loss` in nats per example, `accuracy`, the bounds of its 95 % confidence `interval` (see
    `wilson_interval`), the number of `examples`, `confusion` (see `confusion_matrix`), `recall`, a
    dictionary by label of the shares of a class that are recognised, `None` of a class without
    examples, and `calibration` (see `calibration`).

  Raises:
    ValueError: for another number of labels than of classes.
  """
  if logits.shape[-1] != len(labels):
    raise ValueError(
      f"labels are {len(labels)}, expected one for each of {logits.shape[-1]} logits"
    )
  answers = logits.argmax(axis=-1)
  right, total = int((answers == targets).sum()), len(targets)
  matrix = confusion_matrix(answers, targets, len(labels))
  return {
    "loss": float(-log_softmax(logits, axis=-1)[np.arange(total), targets].mean()),
    "accuracy": right / total,
    "interval": wilson_interval(right, total),
    "examples": total,
    "recall": {
      label: int(row[i]) / int(row.sum()) if row.any() else None
      for i, (label, row) in enumerate(zip(labels, matrix, strict=True))
    },
    "confusion": matrix.tolist(),
    "calibration": calibration(logits, targets),
  }


def confusion_matrix(answers: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
  """How many examples of a class (row) were taken for a class (column), int64."""
  return np.bincount(targets * classes + answers, minlength=classes**2).reshape(classes, classes)


def calibration(logits: np.ndarray, targets: np.ndarray, *, bins: int = 15) -> dict[str, Any]:
  """How far confidence, the likeliest class's probability, is from accuracy.

      error = sum_bins (examples / n) |accuracy - confidence|

  with the means of a bin (Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599). Bins are equally
  wide and include their upper ends.

  Returns:
    `expected_error`, and `bins`, a list from the lowest confidence on of `above` and `up_to`, the
    number of `examples`, and the means `confidence` and `accuracy`, which are `None` without any.
  """
  confidence = softmax(logits, axis=-1).max(axis=-1)
  right = logits.argmax(axis=-1) == targets
  edges = np.arange(bins + 1) / bins
  # A probability that rounding has above 1 is in the last bin.
  which = np.clip(np.searchsorted(edges, confidence) - 1, 0, bins - 1)
  rows, error = [], 0.0
  for i in range(bins):
    there = which == i
    count = int(there.sum())
    means = [float(a[there].mean()) if count else None for a in (confidence, right)]
    rows.append(
      {
        "above": float(edges[i]),
        "up_to": float(edges[i + 1]),
        "examples": count,
        "confidence": means[0],
        "accuracy": means[1],
      }
    )
    if count:
      error += count / len(targets) * abs(means[1] - means[0])
  return {"expected_error": error, "bins": rows}


def milliseconds_heard(
  model: SequenceModule,
  logits: np.ndarray,  # [1 + prefixes, n, classes]
  targets: np.ndarray,  # [n]
  step: int,
  length: int,
) -> list[list[float]]:
  """Accuracy of the answers about the first so many milliseconds of audio: `[[ms, accuracy], ...]`.

  Nothing behind them is heard, not by the front end and not by look-ahead: the model answers as if
  the recording ended there. The last is of whole clips; shorter ones count as heard whole.

  Args:
    model: with a front end.
    logits: of `class_logits`, by prefixes of `step` samples.
    targets: the classes.
    step: samples from one prefix to the next; those of less than 100 ms are left out.
    length: samples of a clip.
  """
  rate = model.front_end.analysis.sample_frequency
  ends = [*(step * (i + 1) for i in range(len(logits) - 1)), length]
  shares = (logits.argmax(axis=-1) == targets).mean(axis=-1)
  points = zip(ends, shares, strict=True)
  return [
    [1000 * end / rate, float(share)]
    for end, share in points
    if end == length or 1000 * end / rate >= FIRST_HEARD
  ]


def samples_of(model: SequenceModule, milliseconds: float) -> int:
  """At the rate of its front end, rounded."""
  samples = round(model.front_end.analysis.sample_frequency * milliseconds / 1000)
  if samples < 1:
    raise ValueError(f"{milliseconds} ms are no sample, expected at least one")
  return samples


def false_alarms(
  model: SequenceModule,
  labels: Sequence[str],
  *,
  seconds: int = 120,
  recordings: Iterable[np.ndarray] = (),
  threshold: float = 0.8,
  form: Form = "chunkwise",
  batch_size: int = 100,
) -> dict[str, Any]:
  """How often the model hears a word where there is only noise.

  Noise is cut into windows of a second, which the model hears each from a fresh state. One is an
  alarm if in the answer at its end a class has a probability above `threshold`, other than those
  whose labels begin with an underscore, such as `_silence_` and `_unknown_`; without such classes
  any confident answer is an alarm. The rate is alarms per hour of noise: none in w windows means
  less than 3 x 3600 / w, with 95 % confidence.

  A third of the `seconds` each are white, pink and brown noise, always the same, whose
  windows are from -60 to -20 decibels of full scale (root mean square) at random, with nothing
  below 20 Hz.

  Args:
    model: with a front end.
    labels: of its classes.
    seconds: of noise that is made.
    recordings: of noise, samples `[n]` at the model's rate, int16 or floats in [-1, 1]; what is
      left over behind a recording's last second is not heard.
    threshold: of probabilities.
    form: the algorithm.
    batch_size: windows in a call.

  Returns:
    `per_hour`, the numbers of `alarms` and `windows` by kind of noise, and `threshold`.

  Raises:
    ValueError: for numbers that cannot be, or if there is no window.
  """
  if not 0 <= threshold < 1:
    raise ValueError(f"threshold is {threshold}, expected 0 to below 1")
  if seconds < 0 or seconds % len(COLOURS):
    raise ValueError(f"seconds is {seconds}, expected a multiple of {len(COLOURS)}")
  rate = samples_of(model, 1000)
  noises = coloured_noise(seconds // len(COLOURS), rate) if seconds else {}
  if cuts := [_windows(recording, rate) for recording in recordings]:
    noises["recordings"] = np.concatenate(cuts)
  names = [name for name, windows in noises.items() for _ in windows]
  if not names:
    raise ValueError("there is no noise of a second to listen to")
  rows = [{"inputs": w, "targets": np.int32(0)} for windows in noises.values() for w in windows]
  logits = class_logits(model, rows, form=form, batch_size=batch_size)[0][0]
  words = np.array([not label.startswith("_") for label in labels])
  alarms = (softmax(logits, axis=-1) * words).max(axis=-1) > threshold
  found = dict.fromkeys(noises, 0)
  for name, alarm in zip(names, alarms.tolist(), strict=True):
    found[name] += alarm
  return {
    "per_hour": 3600 * int(alarms.sum()) / len(alarms),
    "alarms": found,
    "windows": {name: len(windows) for name, windows in noises.items()},
    "threshold": threshold,
  }


def coloured_noise(windows: int, rate: int) -> dict[str, np.ndarray]:
  """Seconds of noise by colour, int16 `[windows, rate]`; see `false_alarms`."""
  rng = np.random.default_rng(0)
  pitch = np.fft.rfftfreq(rate, 1 / rate)
  noises = {}
  for name, power in COLOURS.items():
    gain = np.where(pitch < LOWEST_PITCH, 0, np.maximum(pitch, 1) ** (-power / 2))
    x = np.fft.irfft(np.fft.rfft(rng.standard_normal((windows, rate))) * gain, rate)
    level = 10 ** (rng.uniform(*LEVELS, (windows, 1)) / 20)
    x *= level / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    noises[name] = _int16(x)
  return noises


def _windows(recording: np.ndarray, rate: int) -> np.ndarray:
  """Its seconds, int16 `[seconds, rate]`."""
  x = np.asarray(recording)
  if x.ndim != 1 or x.dtype.kind not in "if":
    shape = f"{x.dtype}{list(x.shape)}"
    raise ValueError(f"a recording is {shape}, expected samples int16[n] or float[n]")
  x = x if x.dtype.kind == "i" else _int16(x)
  return x[: len(x) // rate * rate].reshape(-1, rate)


def _int16(x: np.ndarray) -> np.ndarray:
  """Of floats in [-1, 1]."""
  return np.clip(np.round(x * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
