r"""Retention's kernel on a Hopper GPU: its errors, and its time beside other functions'.

    python benchmarks/gpu_retention.py [--quick] [--json=FILE]

Errors in bfloat16 first, of small cases against float64 (`gpu_numerics.py`), and at every timed
shape against XLA's chunkwise form in float32. Then times in bfloat16, of the forward pass and of it
with the gradients of q, k and v, decays constant: all that `gpu_rivals.py` lists take turns,
several calls in a turn, so that their start is not measured. At last errors in float32, whose
kernels compile slowly. An error that is too large makes the exit status 1.

`bound` is the larger of two times: of the bytes of q, k, v, outputs and gradients, each read or
written once in a pass, at the card's memory bandwidth, and of the products of the chunkwise form
with chunks of 64 at its peak; of attention, of those of causal pairs. `ratio` is ms over bound.
Goals are for an H100. `--quick` leaves out shapes without one.

The training step of the 1.3B RetNet, 16 rows of 4,096 tokens, vocabulary 128,256, bfloat16 (goal:
43,000 tokens/s, which its log lines tell):

    python train.py --config=configs/retnet_1b.py --workdir=runs/h100 \
      --config.seq_len=4096 --config.batch_size=16 --config.model.vocab_size=128256 \
      --config.data.tokenizer=bytes --config.total_steps=60 --config.eval.max_tokens=65536

Compiled for an H100 it takes 41 GiB with `remat="full"`, as the configuration has it, and AdamW;
`"dots"` would take 101. A checkpoint of 20 GiB is written at the end. Retention there is XLA's:
`None` does not choose the kernel on GPUs, and a model cannot ask for it.
"""

import functools
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import gpu_numerics
import gpu_rivals
import jax
import jax.numpy as jnp
from gpu_rivals import Program
from measure import (
  Time,
  environment,
  interleaved,
  is_hopper,
  median,
  parser,
  ratio,
  save,
  timed,
  told,
)

from triform.arch.flops.peaks import peak_flops
from triform.arch.flops.retention import CORES
from triform.arch.flops.work import Call
from triform.kernels.retention import specs
from triform.kernels.retention.gpu_plan import CHUNK
from triform.kernels.retention.specs import Shape

GOALS = {  # ms of the kernel on an H100: forward, and with gradients
  Shape(4, 4096, 16, 128, 128): (0.095, 0.47),
  Shape(1, 65536, 16, 128, 128): (0.45, 2.0),
  specs.RETNET: (0.12, 0.6),
  specs.LONG: (0.75, 3.5),
}
SHAPES = (*GOALS, *(shape for shape in specs.ALL if shape not in GOALS))
PASSES = ("forward", "forward+backward")
# Bytes/s from the maker's data sheets, by what a device's kind begins with.
BANDWIDTHS = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12, "NVIDIA H100 NVL": 3.9e12}
ROUNDS = 15
TURN = 0.02  # seconds
MOST_CALLS = 100  # in a turn


class Card(NamedTuple):
  kind: str
  flops: float  # a second
  bandwidth: float


def name_of(shape: Shape) -> str:
  return ",".join(map(str, shape))


def card(device: jax.Device) -> Card:
  known = (n for kind, n in BANDWIDTHS.items() if device.device_kind.startswith(kind))
  return Card(device.device_kind, peak_flops(device), next(known, None) or copied())


def copied() -> float:
  """Bytes/s that a copy of a large array reads and writes."""
  array = jnp.zeros(2**30, jnp.int8)
  copy = jax.jit(jnp.invert)
  seconds = [timed(lambda: jax.block_until_ready(copy(array))).wall for _ in range(8)]
  return 2 * array.size / min(seconds)


def bound(shape: Shape, backward: bool, card: Card, attention: bool = False) -> float:
  """Seconds that the least traffic or the products take; see above."""
  b, t, h, k, v = shape
  numbers = b * t * h * (6 * k + 5 * v if backward else 2 * (k + v))
  layer = SimpleNamespace(num_heads=h, num_kv_heads=h, key_size=k, value_size=v)
  layer.decay, layer.chunk_size = "fixed", CHUNK
  form = "parallel" if attention else "chunkwise"
  count = CORES[form](layer, Call(t, form, training=True, causal=True))
  flops = b * (count.forward.flops + (count.backward.flops if backward else 0))
  return max(2 * numbers / card.bandwidth, flops / card.flops)


def prepare(shape: Shape, backward: bool, make) -> Program | str:
  """A compiled program, or why there is none: what others are is not to end the run."""
  try:
    program = make(gpu_rivals.inputs(shape), backward)
    program.wait(program.start())
  except Exception as error:
    return told(error)
  return program


def turns(programs: list[Program]) -> list[list[Time]]:
  """Times of one call of each, by round."""

  def turn(program, calls):
    for _ in range(calls):
      result = program.start()
    program.wait(result)

  def calls(program):
    turn(program, 2)
    seconds = timed(lambda: turn(program, 3)).wall / 3
    return max(3, min(MOST_CALLS, round(TURN / seconds)))

  counts = [calls(program) for program in programs]
  pairs = zip(programs, counts, strict=True)
  times = interleaved([lambda of=of: turn(*of) for of in pairs], ROUNDS)
  return [
    [Time(one.wall / n, one.processor / n) for one in of]
    for of, n in zip(times, counts, strict=True)
  ]


def measure(shape: Shape, backward: bool, card: Card, functions=None) -> list[dict[str, Any]]:
  """A row for each function, of those that ran with `ms`."""
  functions = gpu_rivals.of(shape) if functions is None else functions
  made = {name: prepare(shape, backward, make) for name, make in functions.items()}
  programs = {name: one for name, one in made.items() if not isinstance(one, str)}
  times = dict(zip(programs, turns(list(programs.values())), strict=True))
  forms = [name for name in times if name.startswith("xla")]
  best = min(forms, key=lambda name: median(times[name]), default=None)
  rows = []
  for name, one in made.items():
    row = {"op": name, "pass": PASSES[backward], "shape": name_of(shape)}
    row |= {"dtype": "bfloat16", "device": card.kind}
    row["bound"] = 1e3 * bound(shape, backward, card, attention=name.startswith("attention"))
    if isinstance(one, str):
      rows.append(row | {"failed": one})
      continue
    row["ms"] = 1e3 * median(times[name])
    row["ratio"] = row["ms"] / row["bound"]
    if name == "gpu":
      row["goal"] = GOALS[shape][backward] if shape in GOALS else None
      row["best_xla"] = best
      row["of_best_xla"] = None if best is None else ratio(times[name], times[best])
    rows.append(row)
  return rows


def results(shape: Shape, dtype: str, **options) -> Any:
  return gpu_rivals.ours(gpu_rivals.inputs(shape, dtype), True, **options).start()


def driver() -> str:
  command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
  if shutil.which(command[0]) is None:
    return "unknown"
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stdout.partition("\n")[0]


HEADER = (
  f"{'op':21} {'pass':16} {'shape':18} {'dtype':8} {'device':22} "
  f"{'ms':>9} {'bound':>8} {'ratio':>6} {'goal':>6}"
)


def show(row: dict[str, Any]) -> str:
  text = f"{row['op']:21} {row['pass']:16} {row['shape']:18} {row['dtype']:8} {row['device']:22} "
  if "failed" in row:
    return text + row["failed"]
  text += f"{row['ms']:9.3f} {row['bound']:8.3f} {row['ratio']:6.2f} {row.get('goal') or '':>6}"
  if row.get("of_best_xla"):
    text += f"  {row['of_best_xla']:.2f} of {row['best_xla']}"
  return text


def main() -> int:
  options = parser(__doc__)
  options.add_argument("--quick", action="store_true", help="only shapes that have goals")
  options = options.parse_args()
  device = jax.local_devices()[0]
  if not is_hopper(device):
    sys.exit(f"Retention's kernel needs a Hopper GPU, JAX has found: {device.device_kind}.")
  shapes = tuple(GOALS) if options.quick else SHAPES
  here = environment("jax", "jaxlib") | {"device": device.device_kind}
  here |= {"driver": driver(), "platform": device.client.platform_version}
  print(here)
  errors = gpu_numerics.show(gpu_numerics.check("bfloat16"))
  rows = []

  def keep():  # again and again: a machine that is lent may be taken back
    save(options.json, [*errors, *rows], here)

  keep()
  found = card(device)
  for shape in shapes:
    at_shape = functools.partial(results, shape)
    errors += gpu_numerics.show(gpu_numerics.check_at_size(name_of(shape), at_shape))
    print(HEADER)
    for backward in (False, True):
      for row in measure(shape, backward, found):
        rows.append(row)
        print(show(row), flush=True)
    keep()
  for error in gpu_numerics.check("float32"):
    errors += gpu_numerics.show([error])
    keep()
  wrong = sum(not row["ok"] for row in errors)
  print(f"{len(errors)} errors, {wrong} too large")
  failed = any("failed" in row for row in rows if row["op"] == "gpu")
  return 1 if wrong or failed else 0


if __name__ == "__main__":
  sys.exit(main())
