"""The loss curves of runs, with `gzip -9` and `xz -9` on the same held-out text as bars to clear.

    python benchmarks/loss_curve.py runs/retnet_tiny [...] [--json=FILE] [--picture=FILE]

The picture needs matplotlib (the `plot` extra). The runs are of the default corpus.
"""

import gzip
import json
import lzma
from pathlib import Path

import measure

from triform.arch.data.python_stdlib import held_out_text


def curve(workdir: Path) -> list[dict]:
  """Rows of a run: `bits_per_byte` of a training batch, or `held_out`."""
  config = json.loads((workdir / "config.json").read_text())
  tokens = config["batch_size"] * config["seq_len"]
  rows = []
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    row = {"run": workdir.name, "step": record["step"], "tokens": record["step"] * tokens}
    if "eval_loss" in record:
      rows.append(row | {"held_out": record["eval_bits_per_byte"]})
    else:
      rows.append(row | {"bits_per_byte": record["bits_per_byte"]})
  return rows


def draw(rows: list[dict], bars: dict[str, float], path: str) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4))
  for i, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
    trained, held_out = (
      [(row["tokens"] / 1e6, row[kind]) for row in rows if row["run"] == run and kind in row]
      for kind in ("bits_per_byte", "held_out")
    )
    axes.plot(*zip(*trained, strict=True), color=f"C{i}", linewidth=0.8, alpha=0.25)
    label = f"{run}, held out: {held_out[-1][1]:.2f} at the end"
    axes.plot(*zip(*held_out, strict=True), "o-", color=f"C{i}", label=label)
  for name, style in zip(bars, ("--", ":"), strict=True):
    axes.axhline(bars[name], color="0.4", linestyle=style, label=f"{name}, {bars[name]:.2f}")
  axes.set(xlabel="million tokens", ylabel="bits per byte", ylim=(1, 3.5))
  axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main():
  parser = measure.parser(__doc__)
  parser.add_argument("workdirs", nargs="+", type=Path)
  parser.add_argument("--picture", help="file to draw to")
  options = parser.parse_args()
  text = held_out_text()
  bars = {
    "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
    "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
  }
  rows = [row for workdir in options.workdirs for row in curve(workdir)]
  rows += [{"run": name, "held_out": bar} for name, bar in bars.items()]
  for row in rows:
    if "held_out" in row:
      print(f"{row['run']:20} {row.get('step', ''):>6} {row['held_out']:.3f}")
  measure.save(options.json, rows, measure.environment("triform", "jax"))
  if options.picture:
    draw([row for row in rows if "step" in row], bars, options.picture)


if __name__ == "__main__":
  main()
