"""Results on spoken words as tables and pictures, from what `eval.py --json` wrote of each run.

    python benchmarks/speech.py small FILES --json=OUT.json --picture=OUT.png
    python benchmarks/speech.py comparison FILES --json=OUT.json --picture=OUT.png

`small` are runs of `configs/lmuformer_speech_small.py` (the picture is of accuracy by what was
heard), `comparison` those of `configs/speech_comparison.py` (of accuracy by architecture). A file
is named for its run.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = {
  "run": lambda name, r: name,
  "test accuracy": lambda name, r: f"{100 * r['accuracy']:.1f} %",
  "95 % interval": lambda name, r: " to ".join(f"{100 * x:.1f}" for x in r["interval"]),
  "after 700 ms": lambda name, r: f"{100 * at(r, 700):.1f} %",
  "parameters": lambda name, r: f"{r['parameters']:,}",
  "state": lambda name, r: f"{r['state_bytes']:,} B" if r["state_bytes"] else "none",
  "MAC a second": lambda name, r: f"{r['multiply_accumulates'] / 1e6:.1f} M",
  "accumulates": lambda name, r: f"{r['accumulates'] / 1e6:.1f} M" if r["accumulates"] else "",
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


def table(results: dict[str, dict]) -> str:
  rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
  rows += [[column(name, r) for column in COLUMNS.values()] for name, r in results.items()]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
  figure, axes = plt.subplots(figsize=(6, 0.8 + 0.32 * len(results)), layout="constrained")
  ordered = sorted(results.items(), key=lambda item: item[1]["accuracy"])
  for place, (_, result) in enumerate(ordered):
    low, high = result["interval"]
    axes.plot([100 * low, 100 * high], [place, place], color="0.6")
    axes.plot(100 * result["accuracy"], place, "o", color="tab:blue")
    axes.plot(100 * at(result, 700), place, "o", color="tab:orange", fillstyle="none")
  axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
  axes.set(xlabel="test accuracy, %, with its 95 % interval; hollow: after 700 ms")
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
  print(table(results))
  arguments.json.write_text(json.dumps(results, indent=1) + "\n")
  draw = draw_heard if arguments.what == "small" else draw_compared
  draw(results, arguments.picture)


if __name__ == "__main__":
  main()
