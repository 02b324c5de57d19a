"""Words in a recording, or in what a microphone hears, as they are said.

python -m triform.arch.streaming --workdir=runs/speech clip.wav
arecord -q -t raw -f S16_LE -c 1 -r 16000 | python -m triform.arch.streaming --workdir=runs/speech -

Prints a line for every decision of a `recognition.Spotter` when it falls: its time in seconds of
audio, its label and posterior. The line at the end is the likeliest class then, of the last window
at most. Audio is a WAV or FLAC file of any rate, or on standard input raw samples of 16 bits, the
lower byte first, of one channel at the rate of the model.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from .caches import enable_compilation_cache
from .data.audio_files import read_audio
from .loading import load, load_config
from .loss_by_position import import_pyplot
from .recognition import Answer, Decision, Spotter

BYTES = 2**16  # that are read at once of standard input, at most: those of a pipe
DRAWN = 6  # classes in a picture


def listen(
  workdir: str | os.PathLike,
  file: str,
  *,
  step: int | None = None,
  best: bool = False,
  threshold: float = 0.8,
  window: float | None = None,
  every: float = 0.05,
  picture: str | None = None,
) -> None:
  """Prints what the model in `workdir` hears in `file`, or on standard input if that is `-`.

  `workdir`, `step` and `best` are as of `load`, and `threshold`, `window` and `every` as of
  `Spotter`; the default `window` is as long as the clips that the model learned from. The file is
  WAV or FLAC of any rate; `picture` is one to draw the posteriors to.

  Raises:
    ValueError: if any of them cannot be, or there is not a sample.
  """
  if picture is not None:
    if file == "-":
      raise ValueError("a picture is of a file, not of standard input")
    import_pyplot()  # or it would be missed after all the work
  config = load_config(workdir)
  if window is None:
    window = config["data"].get("seconds", 1.0) if "data" in config else 1.0
  if config.get("compilation_cache", True):
    enable_compilation_cache()
  model, labels = load(workdir, step=step, best=best)
  try:
    spotter = Spotter(model, labels, threshold=threshold, window=window, every=every)
  except ValueError as error:
    raise ValueError(f"{workdir}: {error}") from error
  if file == "-":
    blocks = read_samples(sys.stdin.fileno())
  else:
    rate = int(spotter.recognizer.sample_rate)
    blocks = [read_audio(file, sample_rate=rate).samples]
  kept = []
  for answer in spot(spotter, blocks):
    if picture is not None:  # of a microphone they would never end
      kept.append(answer)
  if picture is not None:
    draw(kept, spotter.recognizer.labels, threshold, picture)


def spot(spotter: Spotter, blocks: Iterable[np.ndarray]) -> Iterator[Answer]:
  """Prints the decisions on blocks of samples as they fall; yields all answers, one at the end."""
  last = None
  for block in blocks:
    for last in spotter.answers(block):
      if last.decision is not None:
        _print(last.decision)
      yield last
  if not spotter.heard:
    raise ValueError("there are no samples to hear")
  end = spotter.heard / spotter.recognizer.sample_rate
  if last is None or last.time != end:
    last = Answer(end, spotter.posteriors(), None)
    yield last
  likeliest = last.posteriors.argmax()
  _print(Decision(end, spotter.recognizer.labels[likeliest], last.posteriors[likeliest]), "end ")


def read_samples(file: int) -> Iterator[np.ndarray]:  # int16[n] each
  """Raw samples from a file descriptor, as soon as there are any; half a sample at the end is none.

  What is there is not waited for to be more.

  Raises:
    ValueError: if it begins like a WAV or FLAC file.
  """
  rest, first = b"", True
  while data := os.read(file, BYTES):
    data = rest + data
    if first and data.startswith((b"RIFF", b"fLaC")):
      kind = "WAV" if data.startswith(b"RIFF") else "FLAC"
      raise ValueError(f"standard input is a {kind} file, expected raw samples: give its path")
    first = False
    whole = len(data) // 2 * 2
    rest = data[whole:]
    if whole:
      yield np.frombuffer(data[:whole], "<i2").astype(np.int16)


def draw(
  answers: Sequence[Answer], labels: Sequence[str], threshold: float, path: str | Path
) -> None:
  """Draws the likeliest classes over time; the ending of `path` is the format."""
  pyplot = import_pyplot()
  times = [answer.time for answer in answers]
  posteriors = np.stack([answer.posteriors for answer in answers])
  drawn = np.argsort(-posteriors.max(axis=0), kind="stable")[:DRAWN]
  figure, axes = pyplot.subplots(figsize=(9, 3.5))
  for i in drawn:
    axes.plot(times, posteriors[:, i], label=labels[i])
  for decision in (answer.decision for answer in answers if answer.decision is not None):
    axes.axvline(decision.time, color="0.6", linewidth=1)
    axes.annotate(
      decision.label, (decision.time, 1.02), xycoords=("data", "axes fraction"), ha="center"
    )
  axes.axhline(threshold, color="0.6", linestyle="--", linewidth=1)
  axes.set(xlabel="seconds", ylabel="posterior", ylim=(0, 1.02))
  axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _print(decision: Decision, before: str = "") -> None:
  time, label, posterior = decision
  print(f"{before}{time:.2f} s  {label}  {posterior:.2f}", flush=True)


if __name__ == "__main__":
  from . import cli

  WORKDIR = flags.DEFINE_string("workdir", None, "the run, as given to train.py, or its export")
  STEP = flags.DEFINE_integer("step", None, "the checkpoint to read; default the newest")
  BEST = flags.DEFINE_bool("best", False, "read that of the lowest evaluation loss, if kept")
  THRESHOLD = flags.DEFINE_float("threshold", 0.8, "the least posterior of a decision")
  WINDOW = flags.DEFINE_float("window", None, "seconds judged; default those of training clips")
  EVERY = flags.DEFINE_float("every", 50.0, "milliseconds of audio from one answer to the next")
  PICTURE = flags.DEFINE_string("picture", None, "draw the posteriors over time to this file")
  flags.mark_flag_as_required("workdir")

  def main(files: list[str]) -> int:
    if len(files) != 1:
      given = ", ".join(files) or "none"
      raise ValueError(f"expected one FILE, or - for standard input, got {given}")
    listen(
      WORKDIR.value,
      files[0],
      step=STEP.value,
      best=BEST.value,
      threshold=THRESHOLD.value,
      window=WINDOW.value,
      every=EVERY.value / 1000,
      picture=PICTURE.value,
    )
    return 0

  cli.run(main, takes_arguments=True)
