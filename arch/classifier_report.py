"""All that there is to know of a trained classifier, as numbers, as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy import class_logits, false_alarms, measures, milliseconds_heard, samples_of
from .audio_cost import clip_energy, operations, sizes, speed, spikes
from .data.batches import Rows
from .interface import Form, SequenceModule
from .loss_by_position import import_pyplot
from .models.lmuformer import LMUFormer
from .spiking import spike_rates

WIDTH = 80  # of the table, beside its names


def classifier_report(
  model: SequenceModule,
  examples: Rows,
  labels: Sequence[str],
  *,
  form: Form = "chunkwise",
  batch_size: int = 100,
  every: float = 50.0,
  noise: int = 120,
  recordings: Sequence[np.ndarray] = (),
  rounds: int = 4,
) -> dict[str, Any]:
  """What a classifier can do and what it costs, ready for JSON.

  Args:
    model: maps `[b, t, ...]` to logits `[b, classes]`.
    examples: see `training.tasks.classification.LabelledData`.
    labels: the names of the classes.
    form: the algorithm of all that is not timed.
    batch_size: examples in a call.
    every: milliseconds from one point of the curve to the next.
    noise: seconds of noise to listen to; 0, without `recordings`, leaves that out.
    recordings: see `accuracy.false_alarms`.
    rounds: how often a clip is heard while time is taken; 0 leaves that out.

  Returns:
    All of `accuracy.measures`, the `labels`, and `cost`: `parameters` and `state_bytes`. If the
    model has a front end and examples are samples, also

      milliseconds_heard      [[ms, accuracy], ...], see `accuracy.milliseconds_heard`
      false_alarms_per_hour   and `false_alarms`, see `accuracy.false_alarms`
      cost                    with `lookahead_ms`, `operations_per_second` of audio and `speed`, see
                              `audio_cost`
      spikes                  of a spiking model: `rates` of its neurons, see `spiking.spike_rates`,
                              in `examples` of the examples, at equal distances
      energy                  of an `LMUFormer`, see `audio_cost.clip_energy`

  Raises:
    ValueError: if there is no example, or for numbers that cannot be.
  """
  options = {"form": form, "batch_size": batch_size}
  audio = getattr(model, "front_end", None) is not None
  audio = audio and len(examples) > 0 and np.ndim(examples[0]["inputs"]) == 1
  step = samples_of(model, every) if audio else None
  logits, targets = class_logits(model, examples, step=step, **options)
  length = len(examples[0]["inputs"])
  result = {
    **measures(logits[-1], targets, labels),
    "labels": list(labels),
    "cost": sizes(model, length),
  }
  if not audio:
    return result
  result["milliseconds_heard"] = milliseconds_heard(model, logits, targets, step, length)
  if noise or len(recordings):
    alarms = false_alarms(model, labels, seconds=noise, recordings=recordings, **options)
    result |= {"false_alarms_per_hour": alarms.pop("per_hour"), "false_alarms": alarms}
  rates = {}
  if spikes(model):
    rates, heard = _rates(model, examples, form, batch_size)
    result["spikes"] = {"rates": rates, "examples": heard}
  rate = model.front_end.analysis.sample_frequency
  result["cost"] |= {
    "lookahead_ms": 1000 * model.lookahead / rate,
    "operations_per_second": operations(model, length, rates),
  }
  if isinstance(model, LMUFormer):
    result["energy"] = clip_energy(model, length, rates)
  if rounds:
    result["cost"]["speed"] = speed(model, length, rounds=rounds)
  return result


def _rates(model, examples, form, most) -> tuple[dict[str, float], int]:
  """Of some examples from all over, as they may be in the order of their classes."""
  which = np.unique(np.linspace(0, len(examples) - 1, most).astype(int)).tolist()
  rows = [examples[i] for i in which]
  x = np.stack([row["inputs"] for row in rows])
  mask = np.stack([row["mask"] for row in rows]) if "mask" in rows[0] else None
  return spike_rates(model, x, mask=mask, form=form), len(rows)


def table(result: dict[str, Any]) -> str:
  """The result of `classifier_report` behind its accuracy, for people to read."""
  cost, error = result["cost"], result["calibration"]["expected_error"]
  shown = [(label, "-" if r is None else f"{r:.3f}") for label, r in result["recall"].items()]
  lines = _columns("recall", shown)
  lines.append(("calibration", f"expected error {error:.4f}"))
  if "false_alarms" in result:
    alarms, windows = result["false_alarms"]["alarms"], result["false_alarms"]["windows"]
    kinds = ", ".join(f"{name} {n} of {windows[name]}" for name, n in alarms.items())
    threshold = result["false_alarms"]["threshold"]
    lines.append(
      ("false alarms", f"{result['false_alarms_per_hour']:,.0f} an hour above {threshold}: {kinds}")
    )
  if "milliseconds_heard" in result:
    points = [(f"{ms:.0f}", f"{share:.3f}") for ms, share in result["milliseconds_heard"]]
    lines += _columns("ms heard", points)
  lines += [("parameters", f"{cost['parameters']:,}"), ("state", f"{cost['state_bytes']:,} bytes")]
  if "lookahead_ms" in cost:
    lines += _costs(result)
  return "\n".join(f"{name:<14}  {shown}" for name, shown in lines)


def _columns(name: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
  """Pairs, one above the other, as many in a row as there is room for."""
  width = max(len(text) for pair in pairs for text in pair) + 2
  lines, most = [], max(1, WIDTH // width)
  for start in range(0, len(pairs), most):
    for row in zip(*pairs[start : start + most], strict=True):
      lines.append(("" if lines else name, "".join(f"{text:>{width}}" for text in row)))
  return lines


def _costs(result: dict[str, Any]) -> list[tuple[str, str]]:
  cost, own = result["cost"], result["cost"]["operations_per_second"]
  lines = [("look-ahead", f"{cost['lookahead_ms']:g} ms, of the model behind its frames")]
  if own["multiply_accumulates"] is not None:
    shown = f"{own['multiply_accumulates']:,.0f} multiply-accumulates"
    if "spikes" in result:
      shown += f", {own['accumulates']:,.0f} accumulates"
    shown += f" (front end {own['front_end']:,.0f})"
    lines.append(("a second takes", shown))
  if "spikes" in result:
    rates = result["spikes"]["rates"]
    mean, low, high = sum(rates.values()) / len(rates), min(rates.values()), max(rates.values())
    lines.append(("spikes", f"{mean:.3f} a neuron and frame, layers {low:.3f} to {high:.3f}"))
  if "energy" in result:
    energy = result["energy"]
    frames = f"a clip of {energy['frames']} frames, by convention"
    lines.append(("energy", f"{1e6 * energy['joules_per_clip']:,.3g} uJ {frames}"))
  if "speed" in cost:
    lines += _speeds(cost["speed"])
  return lines


def _speeds(speed: dict[str, Any]) -> list[tuple[str, str]]:
  on = f"{speed['device']}, {speed['cores']} core" + "s" * (speed["cores"] > 1)
  lines = []
  if speed["stream"] is not None:
    for name in ("silent", "answering"):
      times = speed["stream"][name]
      shown = f"{times['median']:,.0f} us for 10 ms, 95th percentile {times['percentile_95']:,.0f}"
      lines.append((name, f"{shown} ({on})"))
    lines.append(("real time", f"factor {speed['stream']['real_time_factor']:.4f}"))
  clips = speed["clips"]
  shown = f"{clips['seconds_per_second']:,.0f} s of audio a second"
  return [*lines, ("whole clips", f"{shown}, {clips['batch_size']} at a time ({on})")]


def draw(result: dict[str, Any], path: str | Path) -> None:
  """Draws the confusion matrix and, beside it, accuracy by what was heard, if it is there.

  The ending of `path` is the format.
  """
  pyplot = import_pyplot()
  labels, curved = result["labels"], "milliseconds_heard" in result
  side = max(4.0, 1.5 + 0.27 * len(labels))  # inches: room for a line of text to a class
  widths = (side + 1, 5)[: 1 + curved]
  figure, axes = pyplot.subplots(
    1,
    1 + curved,
    figsize=(sum(widths), side + 0.5),
    width_ratios=widths,
    squeeze=False,
    layout="constrained",
  )
  _draw_confusion(axes[0][0], np.array(result["confusion"]), labels, result["accuracy"])
  if curved:
    _draw_curve(axes[0][1], result)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _draw_confusion(axes, matrix: np.ndarray, labels: Sequence[str], accuracy: float) -> None:
  """Colours are shares of a class, numbers are examples."""
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
  size = 8 if len(labels) <= 16 else 7
  places = range(len(labels))
  axes.set_xticks(places, labels, rotation=90, fontsize=size)
  axes.set_yticks(places, labels, fontsize=size)
  for (row, column), count in np.ndenumerate(matrix):
    if count:
      colour = "white" if shares[row, column] > 0.5 else "black"
      text = {"ha": "center", "va": "center", "color": colour, "fontsize": size - 1}
      axes.text(column, row, str(count), **text)
  axes.set(xlabel="answer", ylabel="class", title=f"accuracy {accuracy:.2%}")


def _draw_curve(axes, result: dict[str, Any]) -> None:
  heard, shares = np.array(result["milliseconds_heard"]).T
  axes.plot(heard, 100 * shares, "o-", markersize=4)
  chance = 100 / len(result["labels"])
  axes.axhline(chance, color="0.6", linestyle="--", linewidth=1)
  axes.text(heard[-1], chance, "chance, of equal classes", ha="right", va="bottom", color="0.4")
  axes.set(xlabel="milliseconds of audio heard", ylabel="accuracy, %")
  axes.set(xlim=(0, None), ylim=(0, 102))
  axes.set_box_aspect(0.8)
  axes.grid(color="0.9")
