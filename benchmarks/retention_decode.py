"""What a token of decoding costs retention: the step as XLA compiles it, and one that replays.

    PYTHONPATH=DIR python benchmarks/retention_decode.py [--json=FILE]

DIR has JAX's CUDA plugin (see BUILD.md). Rows are of three kinds, bfloat16 with a float32 state:

- `bytes`, compiled for a TPU v5e and an H100 that are not here: what a step moves through memory,
  `bound` what a plain step is given and gives, each once, and `state_moves` how often the state
  moves, 2 being one read and one write. `form` is the library's `step`; `old_state`, the same with
  outputs from the state before the token; or `replay`, the state written once in `window` tokens,
  of which this is the mean. For the TPU `bundles` is an upper count of the cycles of the
  instruction that updates the state, all grid steps together (a bundle may still wait), and
  `hbm_cycles` the bytes over 819 GB/s at 1.5 GHz.
- `time` on this CPU, the streams taking turns; `update` scales the state in place.
- `model`: of a step of `configs/retnet_1b.py` in bfloat16, the bytes that the state is, and what
  is left of all if the state's bytes shrink as with a window of 8 on the TPU.
"""

import functools
import importlib.util
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not dumped
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "LIBTPU_INIT_ARGS": (
    f"--xla_jf_dump_to={tempfile.gettempdir()}/retention_decode.{os.getpid()}"
    " --xla_jf_dump_llo_text=true"
  ),
}

import hlo_bytes
import jax
import jax.numpy as jnp
import measure
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from triform import kernels
from triform.arch import build
from triform.arch.interface import state_bytes
from triform.kernels.retention.specs import DECODING, Shape

DUMP = Path(tempfile.gettempdir(), f"retention_decode.{os.getpid()}")
TARGETS = {
  "v5e": {"platform": "tpu", "topology_name": "v5e:2x2"},
  "h100": {"platform": "cuda", "topology_name": "h100", "topology": "1x1x1"},
}
H100 = Path(__file__).with_name("h100.txtpb")
HBM = 819 / 1.5  # bytes a cycle of a v5e
WINDOWS = (4, 8, 16)
WINDOW = 8  # of the model
TIMED = {DECODING[0]: 64, DECODING[1]: 16}  # and the tokens of a turn
ROUNDS = 7


def step(q, k, v, log_decay, state):
  return kernels.retention(q, k, v, log_decay, state=state, form="recurrent")


def old_state(q, k, v, log_decay, state):
  """`o = exp(log_decay) S^T q + (q . k) v` with S before the token."""
  query, key, value = (a[:, 0].astype(state.dtype) for a in (q, k, v))
  decay = jnp.exp(log_decay)[:, None]
  read = decay * jnp.einsum("bhkv,bhk->bhv", state, query)
  o = read + jnp.sum(query * key, axis=-1, keepdims=True) * value
  state = decay[..., None] * state + key[..., None] * value[:, :, None]
  return o[:, None].astype(v.dtype), state


def replay(n, q, k, v, log_decay, state, *, write):
  return kernels.retention_step(n, q, k, v, log_decay, state, write=write)


def arguments(shape: Shape, window: int | None = None):
  """q, k, v, log_decay and a state, or what `replay` takes."""
  rng = np.random.default_rng(0)
  b, t, h, k, v = shape
  heads = [jnp.asarray(rng.normal(size=(b, t, h, n)) / 4, jnp.bfloat16) for n in (k, k, v)]
  log_decay = jnp.log1p(-(2.0 ** -(5 + jnp.arange(h) / 2)))
  state = jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32)
  if window is None:
    return *heads, log_decay, state
  return np.int32(0), *heads, log_decay, kernels.new_replay(state, window, h, jnp.bfloat16)


def compiled(target: str, f, shape: Shape, window: int | None = None):
  """The program for a device that is not here, which may overwrite the state."""
  config = {"target_config": H100.read_text()} if target == "h100" else {}
  devices = topologies.get_topology_desc(**TARGETS[target], **config).devices
  mesh = Mesh(np.array(devices[:1]), ("x",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
    jax.eval_shape(functools.partial(arguments, shape, window)),
  )
  shutil.rmtree(DUMP, ignore_errors=True)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(f, donate_argnums=len(abstract) - 1).lower(*abstract).compile()


def bytes_of(target: str, f, shape: Shape, window: int | None = None) -> dict:
  program = compiled(target, f, shape, window)
  text, elements = program.as_text(), math.prod(shape)
  found = {
    "bytes": hlo_bytes.moved(text),
    "state_moves": hlo_bytes.moves(text, elements),
    "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
  }
  if target == "v5e" and window is None:
    found |= {"bundles": bundles(text, elements), "hbm_cycles": round(found["bytes"] / HBM)}
  return found


def bundles(text: str, elements: int) -> int:
  """Of all grid steps of the one instruction that moves the state."""
  names = hlo_bytes.users(text, elements)
  if len(names) > 1:
    return None
  (line,) = re.findall(rf"^.*%{re.escape(names[0])} = .*$", text, re.MULTILINE)
  steps = re.search(r'"iteration_bounds":\[([^\]]*)\]', line)[1].replace('"', "").split(",")
  (dump,) = DUMP.glob(f"*-{names[0]}-*schedule-analysis_final_bundles.txt")
  total = re.search(r"total scheduled bundles:\s*(\d+)", dump.read_text())
  return int(total[1]) * math.prod(map(int, steps))


def byte_rows(target: str, shape: Shape) -> list[dict]:
  common = {"kind": "bytes", "target": target, "shape": ",".join(map(str, shape))}
  rows = [common | {"form": f.__name__} | bytes_of(target, f, shape) for f in (step, old_state)]
  for window in WINDOWS:
    kept, written = (
      bytes_of(target, functools.partial(replay, write=write), shape, window)
      for write in (False, True)
    )
    mean = {name: ((window - 1) * kept[name] + written[name]) / window for name in kept}
    rows.append(common | {"form": "replay", "window": window} | mean)
  given = jax.eval_shape(functools.partial(arguments, shape))
  both_ways = jax.tree.leaves((given, jax.eval_shape(step, *given)))
  bound = sum(a.size * a.dtype.itemsize for a in both_ways)
  return [row | {"bound": bound, "bytes_of_bound": row["bytes"] / bound} for row in rows]


class Stream:
  """A state that takes one token after another, as often as it is asked."""

  def __init__(self, shape: Shape, f, window: int | None = None):
    *self.inputs, self.state = arguments(shape, window)
    last = len(self.inputs)
    self.window = window
    if window is None:
      self._steps = [jax.jit(f, donate_argnums=last)]
    else:
      self._steps = [
        jax.jit(functools.partial(f, write=write), donate_argnums=last) for write in (False, True)
      ]
    self.run(window or 1)  # compiles

  def run(self, tokens: int) -> None:
    for token in range(tokens):
      n = token % (self.window or 1)
      if self.window:
        self.inputs[0] = np.int32(n)
      program = self._steps[self.window is not None and n == self.window - 1]
      self.out, self.state = program(*self.inputs, self.state)
    jax.block_until_ready((self.out, self.state))


def update(q, k, v, log_decay, state):
  return q, state * 0.999


def time_rows(shape: Shape, tokens: int, rounds: int) -> list[dict]:
  streams = {f.__name__: Stream(shape, f) for f in (step, old_state, update)}
  streams |= {f"replay {window}": Stream(shape, replay, window) for window in WINDOWS}
  runs = [functools.partial(stream.run, tokens) for stream in streams.values()]
  times = dict(zip(streams, measure.interleaved(runs, rounds), strict=True))
  return [
    {
      "kind": "time",
      "shape": ",".join(map(str, shape)),
      "form": name,
      "milliseconds": measure.median(times[name]) / tokens * 1e3,
      "best_milliseconds": min(t.wall for t in times[name]) / tokens * 1e3,
      "speedup_over_step": measure.ratio(times["step"], times[name]),
      "cores": measure.cores(times[name]),
    }
    for name in streams
  ]


def model_rows(left: float) -> list[dict]:
  path = Path(__file__).parents[1] / "configs/retnet_1b.py"
  spec = importlib.util.spec_from_file_location("retnet_1b", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config().model.to_dict()
  model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
  params = nnx.state(model, nnx.Param)
  table = params.pop("embedding")
  read = 2 * sum(a.size for a in jax.tree.leaves(params))  # of the table only rows
  rows = []
  for b in sorted({shape.b for shape in DECODING}):
    state = state_bytes(jax.eval_shape(functools.partial(model.init_state, b)))
    step = read + 2 * state + 2 * b * jax.tree.leaves(table)[0].shape[-1]
    rows.append(
      {"kind": "model", "batch": b, "bytes": step, "state_share": 2 * state / step}
      | {"left_by_replay": 1 - (1 - left) * 2 * state / step}
    )
  return rows


def main():
  parser = measure.parser(__doc__)
  parser.add_argument("--rounds", type=int, default=ROUNDS)
  options = parser.parse_args()
  rows = []

  def add(found):
    for row in found:
      rows.append(row)
      print(*(f"{k}={round(v, 3) if isinstance(v, float) else v}" for k, v in row.items()))

  for target in TARGETS:
    for shape in DECODING:
      add(byte_rows(target, shape))
  for shape, tokens in TIMED.items():
    add(time_rows(shape, tokens, options.rounds))
  replayed = [row["bytes_of_bound"] for row in rows if row.get("window") == WINDOW]
  add(model_rows(replayed[1]))  # 32 rows on the TPU
  shutil.rmtree(DUMP, ignore_errors=True)
  measure.save(options.json, rows, measure.environment("jax", "flax"))


if __name__ == "__main__":
  main()
