"""Placement on many devices: the mesh, and rules that tell where every array of a run lies.

Two axes divide the batch: devices along `data` hold copies of the parameters, those along `fsdp`
a part each, which XLA gathers layer by layer as they are needed.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .layout import stacked_names

AXES = ("data", "fsdp")
# Name of a parameter (a regular expression, the first that is found in it) and the mesh axes of
# its last axes. The model's width is divided, which other matrices all have.
RULES = (
  (r"w[12]/(input|output)/kernel$", ("fsdp", None, None)),  # one matrix a head: heads are divided
  (r"convs/\d+/(linear/)*kernel$", (None, "fsdp")),  # of inputs of any width
  (r"embedding/embedding$", (None, "fsdp")),
  (r"output/kernel$", (None, "fsdp")),
  (r"kernel$", ("fsdp", None)),
  (r"(scale|bias|gain|norm_weight|log_rate|log_theta|relative_bias|taps|tau_logit)$", ()),
)


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh from text such as `data=2,fsdp=4`; an absent axis is 1, and one `-1` is the rest."""
  devices = jax.devices() if devices is None else devices
  sizes = dict.fromkeys(AXES, 1)
  for part in filter(None, spec.split(",")):
    axis, _, size = part.partition("=")
    if axis not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
      raise ValueError(f"mesh is {spec!r}, expected text such as data=2,fsdp=4 or fsdp=-1")
    sizes[axis] = int(size)
  shape = list(sizes.values())
  given = int(np.prod([size for size in shape if size > 0]))
  if -1 in shape:
    if shape.count(-1) > 1 or len(devices) % given:
      raise ValueError(f"mesh is {spec!r}, which does not divide {len(devices)} devices")
    shape[shape.index(-1)] = len(devices) // given
    given = len(devices)
  if given > len(devices):
    raise ValueError(f"mesh is {spec!r} of {given} devices, but there are {len(devices)}")
  if given < len(devices) and devices[0].process_index != devices[-1].process_index:
    raise ValueError(
      f"mesh is {spec!r} of {given} devices, expected all {len(devices)} of the several processes"
    )
  return Mesh(
    np.asarray(devices[:given]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch are divided among all devices."""
  return NamedSharding(mesh, P(AXES))


def constrain_batch(x: jax.Array) -> jax.Array:
  """Keeps the rows of activations `[b, ...]` divided as the batch is, where a mesh is in scope."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(AXES) <= set(mesh.axis_names):
    return x
  return jax.lax.with_sharding_constraint(x, P(AXES))


def shard_state(
  tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Sequence[str | None]]] = RULES
) -> Any:
  """The sharding of every array of a training state (or of its flat, stacked form).

  Parameters, which lie under `params`, follow `rules`; what an optimizer or an average keeps in
  the shape of a parameter lies where that does; the rest is on every device.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    mesh: as `make_mesh` makes it.
    rules: see `RULES`; `config.sharding_rules` of a run.

  Raises:
    ValueError: naming the parameter, if no rule matches it or its shape cannot be divided.
  """
  leaves, structure = jax.tree.flatten(tree)
  names = structure.flatten_up_to(stacked_names(tree))
  parameters = {}
  for name, leaf in zip(names, leaves, strict=True):
    if name.startswith("params/"):
      name = name.removeprefix("params/")
      parameters[name] = leaf.shape, _spec(name, leaf.shape, mesh, rules)
  return jax.tree.unflatten(
    structure,
    [
      NamedSharding(mesh, _spec_like(name, leaf.shape, parameters))
      for name, leaf in zip(names, leaves, strict=True)
    ],
  )


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules) -> P:
  pattern, axes = next((rule for rule in rules if re.search(rule[0], name)), (None, None))
  if axes is None:
    raise ValueError(f"no sharding rule matches parameter {name} of shape {list(shape)}")
  if len(axes) > len(shape):
    raise ValueError(
      f"sharding rule {pattern!r} names {len(axes)} axes, but parameter {name} has shape "
      f"{list(shape)}"
    )
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  for axis, size in zip(axes, shape, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"parameter {name} has shape {list(shape)}: {size} cannot be divided among the "
        f"{mesh.shape[axis]} devices of mesh axis {axis!r}"
      )
  return P(*axes)


def _spec_like(name: str, shape: tuple[int, ...], parameters: dict) -> P:
  """That of the parameter whose name `name` ends in, if it has the same shape."""
  parts = name.split("/")
  for start in range(len(parts)):
    like = parameters.get("/".join(parts[start:]))
    if like is not None and like[0] == shape:
      return like[1]
  return P()
