"""A training step against torchscale's RetNet in PyTorch, on the CPU.

    python benchmarks/train_torchscale.py CHECKOUT [--torch=PYTHON] [--rounds=N] [--json=FILE]

CHECKOUT is a copy of github.com/microsoft/torchscale, PYTHON an interpreter that has PyTorch, if
that is another one. The same model (26 million parameters, float32), batch and optimizer on both
sides: loss, gradient, clipping, AdamW; our step is the trainer's own. Each side is a process of its
own, and the two take turns, so that a busy neighbour hurts both; rows that are `pinned` run on one
core with one thread. `cores` is processor time over wall time: where it is below the cores there
are, a neighbour had the rest.

Both mix 512 tokens at once (the parallel form). Longer sequences torchscale mixes in chunks of 512,
its default, and we in chunks of 128, ours. Beside our row scale torchscale divides by sums of
absolute scores, which we do not need. Both sides have huge pages, as BUILD.md advises for training
on a CPU; `glibc_tunables` in a row tells, and set to nothing it has both do without.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import types
from pathlib import Path

import measure

SHAPES = {"4x512": (4, 512), "1x4096": (1, 4096)}
ROUNDS = 5
OPTIMIZER = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.05}
CLIP_NORM = 1.0
PEAK_SIZE = 2048
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def tokens(batch: int, length: int):
  import numpy as np

  rng = np.random.default_rng(0)
  return rng.integers(0, measure.MODEL["vocab_size"], (2, batch, length))


def ours(batch: int, length: int):
  """Our training step, our matrix product, and what the step consists of."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from triform.arch import build, flops
  from triform.arch.layout import split_model
  from triform.arch.training.config import default_config
  from triform.arch.training.optimizer import optimizer
  from triform.arch.training.step import TrainState, make_train_step

  config = default_config(**measure.MODEL)
  config.form = "parallel" if length <= 512 else "chunkwise"
  config.optimizer.update(OPTIMIZER | {"clip_norm": CLIP_NORM})
  graphdef, params, variables = split_model(build(config.model, rngs=nnx.Rngs(0)))
  update = optimizer(config.optimizer, 1000)
  held = [TrainState(params, variables, update.init(params))]
  step_fn = jax.jit(make_train_step(graphdef, update, form=config.form, seed=0), donate_argnums=0)
  inputs, targets = tokens(batch, length).astype(np.int32)
  mask = np.ones(inputs.shape, bool)
  reset = np.arange(length)[None] == np.zeros((batch, 1), int)
  batch = jax.device_put(
    {"inputs": inputs, "targets": targets, "reset": reset, "mask": mask, "loss_mask": mask}
  )

  def step():
    held[0], metrics = jax.block_until_ready(step_fn(held[0], batch, np.int32(1)))
    return float(metrics["loss"])

  product, square = jax.jit(jnp.dot), jnp.ones((PEAK_SIZE, PEAK_SIZE))
  per_token = flops.train_flops_per_token(config.model, length, config.form)
  about = {
    "flops": per_token * mask.size,
    "form": config.form,
    "versions": measure.environment("jax", "flax"),
  }
  return step, lambda: product(square, square).block_until_ready(), about


def theirs(batch: int, length: int, checkout: str, threads: int):
  """torchscale's, likewise."""
  import torch
  from torch.nn import functional

  torch.set_num_threads(threads)
  sys.path.insert(0, checkout)
  # Imported by torchscale for what RetNet on one CPU does not use.
  stub("fairscale.nn", checkpoint_wrapper=None, wrap=None)
  stub("timm.models.layers", drop_path=None)
  stub("einops", rearrange=None)
  retnet = importlib.import_module("torchscale.architecture.retnet")
  config = importlib.import_module("torchscale.architecture.config").RetNetConfig(
    vocab_size=measure.MODEL["vocab_size"],
    decoder_embed_dim=measure.MODEL["d_model"],
    decoder_layers=measure.MODEL["num_layers"],
    decoder_retention_heads=measure.MODEL["num_heads"],
    decoder_value_embed_dim=measure.MODEL["value_dim"],
    decoder_ffn_embed_dim=measure.MODEL["ffn_dim"],
    activation_fn="swish",
    no_scale_embedding=False,
    chunkwise_recurrent=length > 512,
  )
  torch.manual_seed(0)
  embedding = torch.nn.Embedding(config.vocab_size, config.decoder_embed_dim)
  torch.nn.init.normal_(embedding.weight, std=config.decoder_embed_dim**-0.5)
  model = retnet.RetNetDecoder(config, embed_tokens=embedding)
  adamw = torch.optim.AdamW(
    model.parameters(),
    lr=OPTIMIZER["learning_rate"],
    betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
    eps=OPTIMIZER["eps"],
    weight_decay=OPTIMIZER["weight_decay"],
    fused=True,
  )
  inputs, targets = torch.from_numpy(tokens(batch, length))

  def step():
    logits, _ = model(inputs)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    adamw.step()
    return loss.item()

  square = torch.ones(PEAK_SIZE, PEAK_SIZE)
  about = {
    "parameters": sum(p.numel() for p in model.parameters()),
    "form": "chunkwise" if config.chunkwise_recurrent else "parallel",
    "versions": measure.environment("torch"),
  }
  return step, lambda: square @ square, about


def stub(name: str, **attributes) -> None:
  parts = name.split(".")
  for n in range(1, len(parts) + 1):
    sys.modules.setdefault(".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
  vars(sys.modules[name]).update(attributes)


def serve(side: str, shape: str, pinned: bool, checkout: str) -> None:
  """The life of a side's process: a line in names what to run, a line out tells its times."""
  if pinned:  # before a library counts the cores
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  threads = len(os.sched_getaffinity(0))
  shape = SHAPES[shape]
  step, product, about = ours(*shape) if side == "ours" else theirs(*shape, checkout, threads)
  step(), product()  # compiles
  print(json.dumps(about), flush=True)
  for line in sys.stdin:
    print(json.dumps(measure.timed({"step": step, "product": product}[line.strip()])), flush=True)


class Side:
  """A process that runs steps of one side when it is told to."""

  def __init__(self, side: str, shape: str, pinned: bool, options):
    python = options.torch if side == "theirs" else sys.executable
    command = [python, __file__, options.checkout, f"--serve={side}", f"--shape={shape}"]
    self._process = subprocess.Popen(
      command + ["--pinned"] * pinned,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.about = self._read()

  def run(self, what: str) -> measure.Time:
    print(what, file=self._process.stdin, flush=True)
    return measure.Time(*self._read())

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"{' '.join(self._process.args)} ended, exit code {self._process.wait()}")
    return json.loads(line)


def row(shape: str, pinned: bool, options) -> tuple[dict, dict]:
  """A comparison, and the versions of both sides."""
  sides = [Side(name, shape, pinned, options) for name in ("ours", "theirs")]
  kept = {what: ([], []) for what in ("step", "product")}
  for n in range(options.rounds):
    for i in (0, 1) if n % 2 == 0 else (1, 0):
      for what, repeats in (("product", 3), ("step", 1)):
        kept[what][i].extend(sides[i].run(what) for _ in range(repeats))
  for side in sides:
    side.close()

  mine, yours = kept["step"]
  peaks = [2 * PEAK_SIZE**3 / min(t.wall for t in times) for times in kept["product"]]
  about = sides[0].about
  found = {
    "shape": shape,
    "pinned": pinned,
    "glibc_tunables": os.environ["GLIBC_TUNABLES"],
    "ours_seconds": measure.median(mine),
    "theirs_seconds": measure.median(yours),
    "speedup": measure.ratio(yours, mine),
    "speedup_of_best": min(t.wall for t in yours) / min(t.wall for t in mine),
    "ours_best_seconds": min(t.wall for t in mine),
    "theirs_best_seconds": min(t.wall for t in yours),
    "ours_cores": measure.cores(mine),
    "theirs_cores": measure.cores(yours),
    "ours_processor_seconds": statistics.median(t.processor for t in mine),
    "theirs_processor_seconds": statistics.median(t.processor for t in yours),
    "ours_flops": about["flops"],
    "ours_peak_flops_per_second": peaks[0],
    "theirs_peak_flops_per_second": peaks[1],
    "ours_bound_seconds": about["flops"] / peaks[0],
    "ours_of_bound": about["flops"] / peaks[0] / min(t.wall for t in mine),
    "ours_form": about["form"],
    "theirs_form": sides[1].about["form"],
    "rounds": options.rounds,
    "ours_step_seconds": [t.wall for t in mine],
    "theirs_step_seconds": [t.wall for t in yours],
  }
  return found, sides[0].about["versions"] | sides[1].about["versions"]


def main():
  parser = measure.parser(__doc__)
  parser.add_argument("checkout", help="folder of torchscale's sources")
  parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch")
  parser.add_argument("--rounds", type=int, default=ROUNDS)
  parser.add_argument("--shape", choices=SHAPES, help="this one only")
  parser.add_argument("--pinned", action="store_true", help="on one core only")
  parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.serve:
    serve(options.serve, options.shape, options.pinned, options.checkout)
    return
  if not (Path(options.checkout) / "torchscale").is_dir():
    parser.error(f"{options.checkout} holds no torchscale")
  os.environ.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
  rows, versions = [], {}
  for pinned in (True,) if options.pinned else (False, True):
    for shape in [options.shape] if options.shape else SHAPES:
      found, versions = row(shape, pinned, options)
      rows.append(found)
      print(
        f"{shape}{', one core' if pinned else ''}: ours {found['ours_seconds']:.2f} s"
        f" (best {found['ours_best_seconds']:.2f}, {found['ours_cores']:.2f} cores,"
        f" {found['ours_of_bound']:.2f} of its products' bound),"
        f" torchscale {found['theirs_seconds']:.2f} s"
        f" (best {found['theirs_best_seconds']:.2f}, {found['theirs_cores']:.2f} cores):"
        f" speedup {found['speedup']:.2f}, of the best {found['speedup_of_best']:.2f}",
        flush=True,
      )
  measure.save(options.json, rows, versions)


if __name__ == "__main__":
  main()
