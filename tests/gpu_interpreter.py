"""Completes JAX's Mosaic GPU interpreter (0.10.2 to 0.12) with what it lacks, for tests.

It has no wgmma with a left operand in registers, no store to an accumulator, before 0.11 no
`plgpu.load` and no layout cast, and `np.matmul` of bfloat16 does not accumulate in float32.
Equations are rewritten before they are interpreted: a store becomes a wgmma that carries a flag.
"""

import functools
import inspect

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state import primitives as state_primitives
from jax._src.state.types import TransposeTransform

Interpreter = jaxpr_interpret.JaxprInterpreter
_interpret = Interpreter.interpret
_arithmetic = Interpreter._interpret_arithmetic_primitive
_wgmma = Interpreter._interpret_wgmma_ref_p
OLD = not hasattr(jaxpr_interpret, "memory")


def _rewrite(eqn):
  if eqn.primitive is primitives.wgmma_accumulator_store_p:
    return eqn.replace(primitive=primitives.wgmma_ref_p, params={"store": True}, outvars=[])
  if OLD and eqn.primitive is primitives.load_p:
    params = {"tree": eqn.params["tree"]}
    return eqn.replace(primitive=state_primitives.get_p, params=params)
  return eqn


def interpret(self, jaxpr, token, *args):
  return _interpret(self, jaxpr.replace(eqns=[_rewrite(e) for e in jaxpr.eqns]), token, *args)


def arithmetic(self, eqn, get_invals):
  if eqn.primitive is gpu_core.layout_cast_p:
    return get_invals()[0]
  return _arithmetic(self, eqn, get_invals)


def _access(memory, key, transforms):
  transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
  if OLD:
    return gpu_callbacks.interpret_utils.to_range(transforms)
  return memory.access(key, transforms)


def _product(token, where, acc, acc_transforms, a, a_transforms, b, b_transforms, *, store, info):
  memory = gpu_callbacks._get_shared_memory()
  if OLD:
    device, point, thread_id = where
    thread = memory.get_global_thread_id(int(device), int(thread_id))
    info = gpu_callbacks.interpret_utils.GPULoggingInfo(
      device_id=int(device),
      grid_point_coords=tuple(int(x) for x in point),
      thread_id=int(thread_id),
      source_info=info,
    )
  else:
    location, thread = where
    info = gpu_callbacks.memory.GPULoggingInfo(location, thread, info)

  def get(key, transforms):
    if transforms is None:
      return np.asarray(key)
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    turned = OLD and [t for t in transforms if isinstance(t, TransposeTransform)]
    if turned:  # always the last one
      transforms = tuple(t for t in transforms if not isinstance(t, TransposeTransform))
    value, *_ = memory.get_buffer_content(
      key, _access(memory, key, transforms), thread, logging_info=info
    )
    return np.asarray(value).T if turned else np.asarray(value)

  if store:
    result = np.asarray(a)
  else:
    x, y = get(a, a_transforms), get(b, b_transforms)
    result = get(acc, acc_transforms) + x.astype(np.float32) @ y.astype(np.float32)
  key = gpu_callbacks.HostAllocationKey.from_array(acc)
  memory.store_buffer_content(
    key, _access(memory, key, acc_transforms), result, thread, logging_info=info
  )
  return token


def wgmma(self, eqn, token, get_invals):
  values = get_invals()
  store = eqn.params.get("store", False)
  if store:
    acc, a = values
    b, acc_transforms, a_transforms, b_transforms = np.zeros(()), (), None, None
  else:
    acc, a, b, *leaves = values
    empty = jax.tree.structure([])
    trees = [eqn.params[f"{n}_transforms_tree"] or empty for n in ("acc", "a", "b")]
    acc_transforms, a_transforms, b_transforms = jax.tree.unflatten(
      jax.tree_util.treedef_tuple(trees), leaves
    )
    acc_transforms = acc_transforms or ()
    if isinstance(eqn.invars[1].aval, jax.core.ShapedArray):
      a_transforms = None  # in registers
  if OLD:
    where = (self.device_info.device_id, self.grid_point_coords, self.thread_id)
  else:
    where = (self.mesh_location, self.thread)
  ordered = {"ordered": True} if "ordered=True" in inspect.getsource(_wgmma) else {}
  call = functools.partial(_product, store=store, info=eqn.source_info)
  token = callback.io_callback(
    call,
    gpu_callbacks.TOKEN_SHAPE_DTYPE,
    token,
    where,
    acc,
    acc_transforms,
    a,
    a_transforms,
    b,
    b_transforms,
    **ordered,
  )
  return token, []


def install():
  Interpreter.interpret = interpret
  Interpreter._interpret_arithmetic_primitive = arithmetic
  Interpreter._interpret_wgmma_ref_p = wgmma
