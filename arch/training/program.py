"""What a run computes, before anything is computed: shapes, places and the compiled step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ..interface import SequenceModule
from ..layout import from_stacked, split_model, to_stacked
from ..models import build
from ..sharding import batch_sharding, shard_state
from .optimizer import optimizer
from .step import TrainState, make_train_step
from .tasks import task_of


@dataclasses.dataclass(frozen=True)
class Program:
  """A training run on a mesh.

  Attributes:
    graphdef: of the model, for `nnx.merge`.
    abstract: the training state as `jax.ShapeDtypeStruct`s with their shardings.
    stacked: the same as checkpoints hold it, see `arch.layout`.
    step: `step(state, batch, n) -> (state, metrics)`, compiled on first use; gives `state` away.
  """

  config: ConfigDict
  mesh: Mesh
  graphdef: nnx.GraphDef
  abstract: TrainState
  stacked: dict[str, jax.ShapeDtypeStruct]
  step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  _make: Callable[[], tuple[Any, Any]]
  _begin: Callable[[Any, Any], TrainState]

  def init(self, leaves: dict[str, np.ndarray] | None = None) -> TrainState:
    """The state before the first step, made in its place.

    Args:
      leaves: parameters and variables to start from instead of random ones, as in `stacked`.
    """
    placed = functools.partial(jax.jit, out_shardings=_shardings(self.abstract))
    if leaves is None:
      return placed(lambda: self._begin(*self._make()))()
    like = {"params": self.abstract.params, "variables": self.abstract.variables}
    made = jax.device_put(from_stacked(leaves, like), _shardings(like))
    return placed(self._begin)(made["params"], made["variables"])

  def from_stacked(self, leaves: dict[str, jax.Array]) -> TrainState:
    """The state that a checkpoint holds."""
    return jax.device_put(from_stacked(leaves, self.abstract), _shardings(self.abstract))

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the devices, of which every process has its own rows."""
    sharding = batch_sharding(self.mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)

  def model(self, state: TrainState) -> SequenceModule:
    """The model to evaluate: with averaged parameters, if the run averages."""
    params = state.params if state.average is None else state.average
    return nnx.merge(self.graphdef, params, state.variables)


def make_program(
  config: ConfigDict,
  mesh: Mesh,
  total_steps: int,
  make_model: Callable[..., SequenceModule] = build,
) -> Program:
  """Prepares the run of `config` on `mesh` without allocating anything.

  Raises:
    ValueError: for a batch that cannot be divided, or see `optimizer` and `shard_state`.
  """
  devices = mesh.size
  if config.batch_size % (config.accumulate * devices):
    raise ValueError(
      f"batch_size is {config.batch_size}, expected a multiple of the {devices} devices of the "
      f"mesh times accumulate={config.accumulate}"
    )
  update = optimizer(config.optimizer, total_steps)

  def make() -> tuple[Any, Any]:
    return split_model(make_model(config.model, rngs=nnx.Rngs(config.seed)))[1:]

  def begin(params, variables) -> TrainState:
    average = None if config.average_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(params, variables, update.init(params), average)

  graphdef, _, _ = split_model(
    nnx.eval_shape(lambda: make_model(config.model, rngs=nnx.Rngs(config.seed)))
  )
  step = make_train_step(
    graphdef,
    update,
    form=config.form,
    seed=config.seed,
    loss=task_of(config.model.architecture).loss(config, devices),
    accumulate=config.accumulate,
    average_decay=config.average_decay,
  )
  shapes = jax.eval_shape(lambda: begin(*make()))
  abstract = _placed(shapes, mesh, config.sharding_rules)
  stacked = _placed(jax.eval_shape(to_stacked, shapes), mesh, config.sharding_rules)

  def placed_step(state, batch, n):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step(state, batch, n)

  compiled = jax.jit(
    placed_step,
    donate_argnums=0,
    in_shardings=(_shardings(abstract), batch_sharding(mesh), None),
    out_shardings=(_shardings(abstract), NamedSharding(mesh, P())),
  )
  return Program(config, mesh, graphdef, abstract, stacked, compiled, make, begin)


def _placed(shapes: Any, mesh: Mesh, rules) -> Any:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shard_state(shapes, mesh, rules),
  )


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
