"""Cycles of the TPU kernels of retention, as the compiler schedules them: nothing is run.

    python benchmarks/tpu_schedule.py [--all] [--json=FILE]

The kernels are compiled for a TPU v5e that is not here, and the compiler's own schedule is read.
`cycles` are the instruction bundles of a grid step's body per head and chunk of 128 tokens. Of a
step's bundles it is an upper count, for those run only at a head's first and last step are in it (a
loop's would be counted once, but the body has none); of time it is a lower bound, for a bundle may
wait, for memory or a unit. `spills` are the stores of spilled registers in the whole body; of its
slots for the four matrix units, `mxu_use` is the share in use. Products alone take `mxu_bound`
cycles, and q, k, v, o, their gradients and saved states, each read or written once, `hbm_bound`.
`ratio` is over the larger, and below 1 where bundles must wait: float32.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import parser, save

from triform.kernels.retention import specs, tpu, tpu_plan
from triform.kernels.retention.specs import Shape
from triform.kernels.retention.tpu_kernels import CHUNK

TOPOLOGY = "v5e:2x2"
MACS = 4 * 128 * 128  # a cycle: four matrix units, in bfloat16
HBM = 819 / 1.5  # bytes a cycle: 819 GB/s at 1.5 GHz
FLOAT32_PASSES = 6  # of the matrix unit, at the precision HIGHEST

DIRECTIONS = ("forward", "backward")
SHAPES = (specs.RETNET, Shape(4, 4096, 16, 128, 128))
TIMEOUT = 600  # seconds to compile
LARGE = 2**16  # elements: more than the gradient of decays has, which XLA keeps in VMEM to sum it


class Case(NamedTuple):
  direction: str
  shape: Shape
  dtype: str = "bfloat16"
  # "constant": no gradient of the decays; "packed": resets and padding; "per token": such decays
  variant: str = "plain"


class Schedule(NamedTuple):
  chunks: int  # a grid step
  bundles: int
  spills: int
  mxu_use: float


class Failed(Exception):
  pass


def cases(everything: bool) -> list[Case]:
  """The rows, in order."""
  rows = [(shape,) for shape in SHAPES]
  if everything:
    variants = ("packed", "per token")
    rows += [(shape, "bfloat16", variant) for shape in SHAPES for variant in variants]
    rows += [(shape,) for shape in specs.ALL if shape not in SHAPES]
    rows += [(specs.RETNET, "float32")]
  found = [Case(direction, *row) for row in rows for direction in DIRECTIONS]
  if everything:  # forward, it is the plain one
    found += [Case("backward", shape, variant="constant") for shape in SHAPES]
  return found


def bounds(case: Case, chunks: int) -> tuple[float, float]:
  """Cycles per head and chunk that the matrix unit and the memory need, of the true sizes."""
  _, _, _, k, v = case.shape
  c, itemsize = CHUNK, jnp.dtype(case.dtype).itemsize
  if case.direction == "forward":
    macs = c * c * (k + v) + 2 * c * k * v
    transfers = (2 * k + 2 * v) * c
  else:
    # A state is saved per grid step, and those before its other chunks are found anew.
    macs = c * c * (3 * k + 2 * v) + (4 + (chunks - 1) / chunks) * c * k * v
    transfers = (4 * k + 3 * v) * c + k * v / chunks
  passes = FLOAT32_PASSES if case.dtype == "float32" else 1
  return passes * macs / MACS, transfers * itemsize / HBM


def schedule(case: Case) -> Schedule:
  """Compiles in a process of its own, for libtpu reads its options but once."""
  with tempfile.TemporaryDirectory() as folder:
    environment = {
      "JAX_PLATFORMS": "cpu",
      "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not dumped
      "JAX_TRACEBACK_FILTERING": "off",  # so that the error comes last
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }
    shape = ",".join(map(str, case.shape))
    command = [sys.executable, __file__, "--one", case.direction, shape, case.dtype, case.variant]
    try:
      child = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT
      )
    except subprocess.TimeoutExpired:
      raise Failed(f"not compiled in {TIMEOUT} seconds") from None
    if child.returncode:
      raise Failed(_error(child))
    chunks = json.loads(child.stdout.splitlines()[-1])["chunks"]
    return Schedule(chunks, *_read(Path(folder), f"retention_{case.direction}"))


def _error(child) -> str:
  lines = [line for line in child.stderr.splitlines() if line.strip()]
  raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
  return (raised or lines or [f"the compiler ended with {child.returncode}"])[-1]


def _read(folder: Path, kernel: str) -> tuple[int, int, float]:
  """Bundles and stored spills of a kernel, and the share of the matrix units' slots in use."""

  def text(ending):
    paths = list(folder.glob(f"*{kernel}*{ending}"))
    if len(paths) != 1:
      raise Failed(
        f"{len(paths)} files *{kernel}*{ending} in the compiler's dump of "
        f"{len(list(folder.iterdir()))} files, expected 1: libtpu may have renamed them"
      )
    return paths[0].read_text()

  analysis = text("schedule-analysis_final_bundles.txt")
  total = re.search(r"total scheduled bundles:\s*(\d+)", analysis)
  head, _, use = text("final_hlo-static-per-bundle-utilization.txt").partition("== UTILIZATION:")
  table = re.search(r"^(MXU,.*)\n([\d ]+)$", head, re.MULTILINE)
  units = table[1].split(", ") if table else []
  if total is None or not {"MXU", "VSTORE:SPILL"} <= set(units):
    raise Failed("the compiler's dump has no count of bundles, or none of MXU or VSTORE:SPILL")
  bundles = np.array([line.split() for line in use.splitlines() if line.strip()], int)
  used, slots = (
    dict(zip(units, counts, strict=True))
    for counts in (bundles.sum(axis=0), len(bundles) * np.array(table[2].split(), int))
  )
  return int(total[1]), int(used["VSTORE:SPILL"]), float(used["MXU"] / slots["MXU"])


def compile_one(case: Case) -> int:
  """Compiles for the TPU; chunks in a grid step."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
  mesh = Mesh(np.array(devices[:1]), ("x",))

  def array(shape, dtype=jnp.float32):
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  b, t, h, k, v = case.shape
  k, v = (size + -size % CHUNK for size in (k, v))
  q, value = (array((b, t, h * size), case.dtype) for size in (k, v))
  state, row = array((b, h, k, v)), array((b, 1, 1, t))
  decays = {
    "plain": (array((h,)), None, None),
    "constant": (array((h,)), None, None),
    "packed": (array((h,)), row, row),
    "per token": (None, array((b, h, 1, t)), None),
  }
  args = (q, q, value, *decays[case.variant], state)

  def forward(f):
    return lambda *args: f(*args, False, None)

  f = forward(tpu._chunkwise)
  if case.direction == "backward":
    results, residuals = jax.eval_shape(functools.partial(_differentiated, case.variant), *args)
    args = jax.tree.map(lambda a: array(a.shape, a.dtype), (residuals, results))
    f = functools.partial(tpu._chunkwise_backward, False, None)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = jax.jit(f).lower(*args).compile().as_text()
  # Copies of an array that XLA places in VMEM would be counted as the kernel's own. It does so with
  # no named shape; where it did, a larger batch changes the body by 2 % at most.
  for shape in re.findall(r"\w+\[([\d,]+)\]\{[^}]*S\(1\)", program):
    if math.prod(map(int, shape.split(","))) >= LARGE:
      raise RuntimeError(f"XLA placed an array [{shape}] in VMEM: enlarge the batch")
  return tpu_plan.heuristic(t // CHUNK)  # nothing is looked up: the TPU is not here


def _differentiated(variant, *args):
  args = jax.tree.map(lambda a: CustomVJPPrimal(a, variant != "constant"), args)
  return tpu._chunkwise_forward(*args, False, None)


def main() -> None:
  options = parser(__doc__)
  options.add_argument("--all", action="store_true", help="every named shape, and variants")
  options.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
  options = options.parse_args()
  if importlib.util.find_spec("libtpu") is None:
    sys.exit("The TPU's compiler is missing: pip install libtpu, in the version jax[tpu] asks for.")
  if options.one:
    direction, shape, dtype, variant = options.one
    case = Case(direction, Shape(*map(int, shape.split(","))), dtype, variant)
    print(json.dumps({"chunks": compile_one(case)}))
    return
  names = ("cycles", "mxu_bound", "hbm_bound", "ratio", "spills", "mxu_use")
  columns = [f"{name:>9}" for name in names]
  print(f"{'direction':9} {'shape':>19} {'dtype':8} {'variant':9}", *columns)
  rows = []
  for case in cases(options.all):
    shape = ",".join(map(str, case.shape))
    print(f"{case.direction:9} {shape:>19} {case.dtype:8} {case.variant:9}", end=" ", flush=True)
    row = {"op": "retention"} | case._asdict() | {"shape": shape, "topology": TOPOLOGY}
    try:
      chunks, bundles, spills, mxu_use = schedule(case)
    except Failed as error:
      print(f"failed: {error}")
      rows.append(row | {"error": str(error)})
      continue
    cycles, (mxu, hbm) = bundles / chunks, bounds(case, chunks)
    ratio = cycles / max(mxu, hbm)
    print(f"{cycles:9.1f} {mxu:9.1f} {hbm:9.1f} {ratio:9.2f} {spills:9} {mxu_use:9.2f}")
    rows.append(
      row
      | {"cycles": round(cycles, 1), "mxu_bound": round(mxu, 1), "hbm_bound": round(hbm, 1)}
      | {"ratio": round(ratio, 2), "spills": spills, "mxu_use": round(mxu_use, 2)}
    )
  save(options.json, rows, {name: importlib.metadata.version(name) for name in ("jax", "libtpu")})
  if any("error" in row for row in rows):
    sys.exit(1)


if __name__ == "__main__":
  main()
