"""Draws the loss curve of a run: `python benchmarks/loss_curve.py --workdir=runs/retnet_tiny`.

Needs matplotlib (the `plot` extra). The held-out bits per byte stand beside the training curve,
with `gzip -9` on the same held-out text as the bar to clear.
"""

import gzip
import json
from pathlib import Path

import matplotlib
from absl import app, flags

from triform.arch.data.python_stdlib import held_out_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WORKDIR = flags.DEFINE_string("workdir", None, "the run")
OUT = flags.DEFINE_string("out", None, "the picture; default WORKDIR/loss_curve.png")
flags.mark_flag_as_required("workdir")


def main(_):
  workdir = Path(WORKDIR.value)
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  trained = [(r["step"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]
  held_out = [(r["step"], r["eval_bits_per_byte"]) for r in records if "eval_loss" in r]
  text = held_out_text()
  bar = 8 * len(gzip.compress(text, 9)) / len(text)

  figure, axes = plt.subplots(figsize=(7, 4))
  axes.plot(*zip(*trained, strict=True), color="0.75", linewidth=0.8, label="training batch")
  axes.plot(*zip(*held_out, strict=True), "o-", label=f"held out, {held_out[-1][1]:.2f} at the end")
  axes.axhline(bar, color="C3", linestyle="--", label=f"gzip -9, {bar:.2f}")
  axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 3.5))
  axes.legend()
  figure.tight_layout()
  figure.savefig(OUT.value or workdir / "loss_curve.png", dpi=120)


if __name__ == "__main__":
  app.run(main)
