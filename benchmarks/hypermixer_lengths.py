"""Whether a causal HyperMixer trains alike on short and on long documents.

    python benchmarks/hypermixer_lengths.py [--json=FILE] [--seeds=2] [--steps=500]

Two layers of width 64 with the options that `HyperMixer` has by default, on the source of Python's
standard library, in windows of 256 and of 4,096 tokens with one learning rate; RetNet beside it,
for what is due to the windows and not to the architecture. Twice:

- `rows`: as many windows in a step, so that nothing but the length differs.
- `tokens`: as many tokens in a step, which are then of fewer documents.

The loss is that of the same held-out text every ten steps, so that it is not the noise of batches;
a spike is its greatest rise over the lowest before.
"""

import json
import platform
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from triform.arch.training.config import default_config
from triform.arch.training.loop import train

JSON = flags.DEFINE_string("json", None, "file to write the result to")
SEEDS = flags.DEFINE_integer("seeds", 2, "runs of each kind")
STEPS = flags.DEFINE_integer("steps", 500, "of each run")

SIZES = {
  "vocab_size": 2048, "d_model": 64, "num_layers": 2, "num_heads": 8, "tie_embeddings": True,
  "dtype": "float32", "scan_layers": False,
}  # fmt: skip
MODELS = {
  "hypermixer": {"mixing_dim": 64, "ffn_dim": 256},
  "retnet": {"value_dim": 128, "ffn_dim": 128, "decay_schedule": "linspace", "chunk_size": 64},
}
BATCHES = {"rows": {256: 4, 4096: 4}, "tokens": {256: 16, 4096: 1}}  # windows by their length
LEARNING_RATE = 4e-3
EVERY = 10


def run(architecture: str, length: int, windows: int, seed: int) -> list[float]:
  """The held-out loss every `EVERY` steps."""
  config = default_config(architecture=architecture, **SIZES, **MODELS[architecture])
  config.update({"seq_len": length, "batch_size": windows, "seed": seed})
  config.total_steps = STEPS.value
  config.optimizer.learning_rate = LEARNING_RATE
  config.eval.every_steps = EVERY
  config.eval.max_tokens = 16_384
  with tempfile.TemporaryDirectory() as folder:
    train(config, folder)
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
  return [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row]


def spike(losses: list[float]) -> float:
  return max(loss - min(losses[: i + 1]) for i, loss in enumerate(losses))


def main(_):
  rows = []
  for seed in range(SEEDS.value):
    for batches, windows in BATCHES.items():
      for architecture in MODELS if batches == "tokens" else ["hypermixer"]:
        for length in windows:
          losses = run(architecture, length, windows[length], seed)
          rows.append(
            {
              "architecture": architecture,
              "batches": batches,
              "length": length,
              "windows": windows[length],
              "seed": seed,
              "final_loss": losses[-1],
              "spike": spike(losses),
              "losses": losses,
            }
          )
          print({k: v for k, v in rows[-1].items() if k != "losses"}, flush=True)
          if JSON.value:
            write(rows)


def write(rows: list[dict]) -> None:
  where = {"jax": jax.__version__, "python": platform.python_version()}
  where["device"] = jax.devices()[0].device_kind
  told = {"steps": STEPS.value, "learning_rate": LEARNING_RATE, "every": EVERY, **where}
  Path(JSON.value).write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
