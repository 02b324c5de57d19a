"""A run small enough for tests, on a corpus of its own; as a script, one that can be killed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import jax

from triform.arch.data import python_stdlib
from triform.arch.training.config import default_config
from triform.arch.training.loop import train

MODEL = {
  "architecture": "retnet",
  "vocab_size": 257,
  "d_model": 16,
  "num_layers": 2,
  "num_heads": 2,
  "value_dim": 32,
  "ffn_dim": 16,
  "chunk_size": 8,
  "dropout": 0.1,
  "scan_layers": False,
}


def write_corpus(root: Path) -> None:
  words = random.Random(0)
  for i in range(80):
    lines = [f"name{words.randrange(30)} = {words.randrange(100)}\n" for _ in range(20)]
    file = root / f"module{i}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


def use_corpus(root: Path) -> None:
  """Trains on `root`, and compiles what runs have in common once."""
  python_stdlib.stdlib_root = lambda: root
  jax.config.update("jax_compilation_cache_dir", str(root.parent / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def tiny_config(folder: Path | None, **changes):
  """Changes are dotted, `{"eval.max_tokens": 64}`; `folder` takes prepared data."""
  config = default_config(**MODEL)
  config.update_from_flattened_dict(
    {
      "data.tokenizer": "bytes",
      "data.dir": None if folder is None else str(folder / "data"),
      "seq_len": 16,
      "batch_size": 2,
      "total_steps": 12,
      "log_every_steps": 2,
      "optimizer.warmup_steps": 2,
      "eval.every_steps": 6,
      "eval.max_tokens": 64,
      "eval.seq_len": 16,
      "eval.batch_size": 2,
      "checkpoint.every_steps": 4,
      "compilation_cache": False,
      "peak_flops": 1e12,
      **changes,
    }
  )
  return config


def run_program(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
  """`python ARGUMENTS` in `folder`, with what is prepared kept there."""
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "TRIFORM_DATA": str(folder / "data")},
    **options,
  )


if __name__ == "__main__":
  corpus, workdir, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
  use_corpus(corpus)
  changes = {"total_steps": steps, "log_every_steps": 1, "checkpoint.every_steps": 5}
  done = train(tiny_config(corpus.parent, **changes), workdir)
  print("done" if done else "stopped", flush=True)
