"""The first steps of small models on meshes of simulated devices; prints what they give as JSON."""

import functools
import json
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_run import tiny_config
from toy import ToyBlock

from triform import kernels
from triform.arch import LanguageModel
from triform.arch.models import build
from triform.arch.sharding import make_mesh
from triform.arch.training.program import make_program
from triform.kernels.retention import tpu

ROWS, STEPS = 16, 3


def toy(config, rngs):
  """Batch statistics in the model."""
  return LanguageModel(
    lambda rngs: ToyBlock(16, dtype=np.float32, param_dtype=np.float32, rngs=rngs),
    vocab_size=config.vocab_size,
    d_model=16,
    num_layers=2,
    norm=nnx.RMSNorm(16, rngs=rngs),
    embedding_init=nnx.initializers.normal(1.0),
    scan_layers=config.scan_layers,
    rngs=rngs,
  )


def losses(mesh: str, make_model, **changes) -> dict:
  config = tiny_config(None, batch_size=ROWS, average_decay=0.5, **changes)
  program = make_program(config, make_mesh(mesh), STEPS, make_model)
  state, values = program.init(), []
  rng = np.random.default_rng(0)
  for step in range(STEPS):
    tokens = rng.integers(0, 257, (2, ROWS, config.seq_len), dtype=np.int32)
    mask = rng.random(tokens.shape[1:]) < 0.9
    batch = {"inputs": tokens[0], "targets": tokens[1], "reset": ~mask, "mask": mask}
    state, metrics = program.step(state, program.put({**batch, "loss_mask": mask}), np.int32(step))
    values.append(float(metrics["loss"]))
  matrices = [a for a in jax.tree.leaves((state.params, state.optimizer)) if a.size >= 16 * 16]
  return {
    "losses": values,
    "average": float(sum((np.asarray(a) ** 2).sum() for a in jax.tree.leaves(state.average))),
    "statistics": [float(np.asarray(a).sum()) for a in jax.tree.leaves(state.variables)],
    "largest_part": max(a.addressable_shards[0].data.size / a.size for a in matrices),
  }


def kernel_on_a_mesh() -> dict:
  """Gradients of retention by its TPU kernel, interpreted: rows along one axis, heads the other."""
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  rng = np.random.default_rng(0)
  rows, heads = P("data", None, "model"), P("data", "model")
  specs = (rows, rows, rows, P("model"), heads)
  shapes = [(2, 128, 4, 128)] * 3 + [(4,), (2, 4, 128, 128)]
  arrays = [np.float32(rng.normal(size=shape) / 4) for shape in shapes]
  arrays[3] = -np.abs(arrays[3])

  def loss(implementation, *arrays):
    *arrays, state = arrays
    results = kernels.retention(*arrays, state=state, implementation=implementation)
    return sum((a**2).sum() for a in results)

  def gradients(implementation):
    return jax.jit(jax.grad(functools.partial(loss, implementation), argnums=range(5)))

  expected = gradients("xla")(*arrays)
  placed = [
    jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
  ]
  tpu.chunkwise = functools.partial(tpu.chunkwise, interpret=True)
  with jax.set_mesh(mesh):
    program = gradients("tpu").lower(*placed).compile()
    got = program(*placed)
  norm = np.linalg.norm
  return {
    "error": float(max(norm(a - b) / norm(b) for a, b in zip(got, expected, strict=True))),
    "placed": all(a.sharding.spec == spec for a, spec in zip(got, specs, strict=True)),
    "gathers": "all-gather" in program.as_text(),
  }


if __name__ == "__main__":
  results = {"kernel": kernel_on_a_mesh()}
  for mesh in ("data=1", "fsdp=-1", "data=2,fsdp=4"):
    results[mesh] = {
      "retnet": losses(mesh, build),
      "toy": losses(mesh, toy, accumulate=2, **{"model.scan_layers": True}),
    }
  json.dump(results, sys.stdout)
