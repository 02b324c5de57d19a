"""Results on spoken words as tables and pictures, from what `eval.py --json` wrote of each run.

    python benchmarks/speech.py small FILES --json=OUT.json --picture=OUT.png
    python benchmarks/speech.py comparison FILES --json=OUT.json --picture=OUT.png

`small` are runs of `configs/lmuformer_speech_small.py` (the picture is of accuracy by what was
heard), `comparison` those of `configs/speech_comparison.py` (of accuracy by architecture). A file
is named for its run, in a comparison for architecture and seed, as in `retnet.1.json`.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COSTS = {
  "parameters": lambda r: f"{r['parameters']:,}",
  "state": lambda r: f"{r['state_bytes']:,} B" if r["state_bytes"] else "none",
  "MAC a second": lambda r: f"{r['multiply_accumulates'] / 1e6:.1f} M",
  "accumulates": lambda r: f"{r['accumulates'] / 1e6:.1f} M" if r["accumulates"] else "",
}
SMALL = {
  "test accuracy": lambda r: f"{100 * r['accuracy']:.1f} %",
  "95 % interval": lambda r: " to ".join(f"{100 * x:.1f}" for x in r["interval"]),
  "after 700 ms": lambda r: f"{100 * at(r, 700):.1f} %",
  **COSTS,
}


def at(result: dict, milliseconds: float) -> float:
  return dict(map(tuple, result["milliseconds_heard"]))[milliseconds]


def kept(path: Path) -> dict:
  """What is kept of a run's evaluation."""
  whole = json.loads(path.read_text())
  cost = whole["cost"]
  own = cost["operations_per_second"]
  kept = {k: whole[k] for k in ("accuracy", "interval", "examples", "loss", "milliseconds_heard")}
  return {
    **kept,
    "expected_calibration_error": whole["calibration"]["expected_error"],
    "false_alarms_per_hour": whole["false_alarms_per_hour"],
    "parameters": cost["parameters"],
    "state_bytes": cost["state_bytes"],
    "multiply_accumulates": own["multiply_accumulates"],
    "accumulates": own["accumulates"],
    "joules_per_clip": whole.get("energy", {}).get("joules_per_clip"),
  }


def table(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def small(results: dict[str, dict]) -> str:
  rows = [[name, *(column(r) for column in SMALL.values())] for name, r in results.items()]
  return table(["run", *SMALL], rows)


def compared(results: dict[str, dict]) -> str:
  """A row for every architecture, the best first."""
  header = ["architecture", "test accuracy by seed", "mean", "mean after 700 ms", *COSTS]
  return table(
    header,
    [
      [
        name,
        ", ".join(f"{100 * r['accuracy']:.1f}" for r in runs) + " %",
        f"{100 * mean(runs):.1f} %",
        f"{100 * float(np.mean([at(r, 700) for r in runs])):.1f} %",
        *(column(runs[0]) for column in COSTS.values()),
      ]
      for name, runs in reversed(by_architecture(results))
    ],
  )


def by_architecture(results: dict[str, dict]) -> list[tuple[str, list[dict]]]:
  """The runs of every architecture, by mean accuracy."""
  found: dict[str, list[dict]] = {}
  for name, result in results.items():
    found.setdefault(name.split(".")[0], []).append(result)
  return sorted(found.items(), key=lambda item: mean(item[1]))


def mean(runs: list[dict]) -> float:
  return float(np.mean([r["accuracy"] for r in runs]))


def draw_heard(results: dict[str, dict], path: Path) -> None:
  figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
  for name, result in results.items():
    heard, shares = zip(*result["milliseconds_heard"], strict=True)
    axes.plot(heard, [100 * share for share in shares], "o-", markersize=3, label=name)
  axes.set(xlabel="milliseconds of audio heard", ylabel="test accuracy, %", ylim=(0, 100))
  axes.grid(color="0.9")
  axes.legend()
  figure.savefig(path, dpi=120)


def draw_compared(results: dict[str, dict], path: Path) -> None:
  ordered = by_architecture(results)
  figure, axes = plt.subplots(figsize=(6, 0.8 + 0.32 * len(ordered)), layout="constrained")
  for place, (_, runs) in enumerate(ordered):
    for run in runs:
      axes.plot(100 * run["accuracy"], place, "o", color="tab:blue", alpha=0.7)
      axes.plot(100 * at(run, 700), place, "o", color="tab:orange", fillstyle="none")
  axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
  axes.set(xlabel="test accuracy, %, of every seed; hollow: after 700 ms")
  axes.grid(axis="x", color="0.9")
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("what", choices=("small", "comparison"))
  parser.add_argument("files", type=Path, nargs="+")
  parser.add_argument("--json", type=Path, required=True)
  parser.add_argument("--picture", type=Path, required=True)
  arguments = parser.parse_args()
  results = {path.stem: kept(path) for path in arguments.files}
  arguments.json.write_text(json.dumps(results, indent=1) + "\n")
  show, draw = {"small": (small, draw_heard), "comparison": (compared, draw_compared)}[
    arguments.what
  ]
  print(show(results))
  draw(results, arguments.picture)


if __name__ == "__main__":
  main()
