"""What a step costs beside the device: host time per step, and start-up to the first step.

    python benchmarks/host_time.py [--start-up] [--json=FILE]

Host time: a RetNet of 24 layers so small that the device has next to nothing to do; what the thread
that calls the compiled step pays in processor time, which no neighbour changes. A training step is
called as the trainer does (its batch to the device, the call, the metrics of the step before to the
host), a decoding step as `generate` does without sampling.
Start-up (`--start-up`): `train.py` from a new process to the end of its first step, first with an
empty compilation cache, then with the one just filled; data and tokenizer are prepared before.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from flax import nnx

from triform.arch import build
from triform.arch.generation import decoding_step
from triform.arch.layout import split_model
from triform.arch.training.step import TrainState, make_train_step

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 24
SIZES = {"vocab_size": 64, "d_model": 8, "num_heads": 2, "value_dim": 8, "ffn_dim": 8}
STEPS, ROUNDS = 20, 15


def small_model(scan_layers: bool):
  config = {"architecture": "retnet", "num_layers": LAYERS, "scan_layers": scan_layers, **SIZES}
  return build(config, rngs=nnx.Rngs(0))


def training(scan_layers: bool):
  """A function that makes one step of training, and the number of arrays in its state."""
  graphdef, params, variables = split_model(small_model(scan_layers))
  optimizer = optax.adamw(1e-3)
  state = TrainState(params, variables, optimizer.init(params))
  step_fn = jax.jit(
    make_train_step(graphdef, optimizer, form="chunkwise", seed=0), donate_argnums=0
  )
  ids = np.zeros((1, 8), np.int32)
  mask = np.ones(ids.shape, bool)
  batch = {"inputs": ids, "targets": ids, "reset": ~mask, "mask": mask, "loss_mask": mask}
  held = {"state": state, "last": None, "step": 0}

  def step():
    state, metrics = step_fn(
      held["state"], jax.device_put(batch), jax.device_put(np.int32(held["step"]))
    )
    if held["last"] is not None:
      jax.device_get(held["last"])
    held.update(state=state, last=metrics, step=held["step"] + 1)
    return metrics

  return step, len(jax.tree.leaves(state))


def decoding(scan_layers: bool):
  model = small_model(scan_layers)
  graphdef, *weights = split_model(model)
  decode, weights = decoding_step(graphdef, weights, 1)
  held = {"state": model.init_state(1), "token": jnp.zeros(1, jnp.int32)}

  def step():
    logits, held["state"] = decode(weights, held["state"], held["token"])
    return logits

  return step, len(jax.tree.leaves((weights, held["state"])))


def host_row(program: str, scan_layers: bool) -> dict:
  step, arrays = {"training": training, "decoding": decoding}[program](scan_layers)
  jax.block_until_ready(step())  # compiles
  host, whole = [], []
  for _ in range(ROUNDS):
    start, thread = time.perf_counter(), time.thread_time()
    for _ in range(STEPS):
      done = step()
    thread = time.thread_time() - thread
    jax.block_until_ready(done)
    host.append(thread / STEPS)
    whole.append((time.perf_counter() - start) / STEPS)
  return {
    "program": program,
    "layers": LAYERS,
    "layout": "scanned" if scan_layers else "unrolled",
    "arrays": arrays,
    "host_seconds_per_step": statistics.median(host),
    "best_host_seconds_per_step": min(host),
    "wall_seconds_per_step": statistics.median(whole),
  }


def first_step(workdir: Path, cache: Path) -> float:
  """Seconds from the start of `train.py` to the end of its first step."""
  command = [sys.executable, "train.py", "--config=configs/retnet_tiny.py", f"--workdir={workdir}"]
  command += ["--config.log_every_steps=1", "--config.total_steps=10"]
  start = time.perf_counter()
  with subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stdout:
      if line.startswith("step 1/"):
        seconds = time.perf_counter() - start
        process.kill()
        return seconds
  raise RuntimeError(f"{' '.join(command)} made no step, exit code {process.returncode}")


def start_up_rows() -> list[dict]:
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    first_step(folder / "prepare", folder / "other")  # corpus and tokenizer, and the disk's cache
    for n in range(2):
      for cache in ("cold", "warm"):
        seconds = first_step(folder / f"{cache}{n}", folder / f"cache{n}")
        rows.append({"program": "train.py", "cache": cache, "seconds_to_first_step": seconds})
  return rows


def main():
  parser = measure.parser(__doc__)
  parser.add_argument("--start-up", action="store_true", help="time train.py's first step too")
  options = parser.parse_args()
  rows = []
  for program in ("training", "decoding"):
    for scan_layers in (True, False):
      rows.append(host_row(program, scan_layers))
      found = rows[-1]
      print(
        f"{program}, {found['layout']}, {found['arrays']} arrays:"
        f" host {found['host_seconds_per_step'] * 1e3:.3f} ms a step"
        f" (step {found['wall_seconds_per_step'] * 1e3:.2f} ms)",
        flush=True,
      )
  if options.start_up:
    rows += start_up_rows()
    for cache in ("cold", "warm"):
      seconds = [r["seconds_to_first_step"] for r in rows if r.get("cache") == cache]
      print(f"train.py to its first step, compilation cache {cache}: {min(seconds):.1f} s (best)")
  measure.save(options.json, rows, measure.environment("jax", "flax"))


if __name__ == "__main__":
  main()
