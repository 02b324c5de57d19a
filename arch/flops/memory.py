"""Bytes of parameters and of what a training step keeps, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from ..interface import Form, SequenceModule
from ..layout import split_model


def parameter_bytes(model: SequenceModule) -> int:
  """Memory of what is trained."""
  return _bytes(jax.tree.leaves(split_model(model)[1]))


def activation_bytes(model: SequenceModule, length: int, form: Form) -> int:
  """What a training step keeps of one row of `length` tokens for the backward pass.

  From the inputs to the features that are read out, with what `remat` leaves; logits are not kept.
  """
  graphdef, params, variables = split_model(model)

  def kept(batch_size: int) -> int:
    """All that the gradient of the parameters closes over, but for the arguments themselves."""

    def residuals(params, variables, ids, reset, mask, seed):
      def encode(params):
        rngs = nnx.Rngs(jax.random.key(seed))
        whole = nnx.merge(graphdef, params, variables)
        return whole.encode(ids, form=form, reset=reset, mask=mask, rngs=rngs)[0]

      return jax.tree.leaves(jax.vjp(encode, params)[1])

    ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    flags = jax.ShapeDtypeStruct(ids.shape, bool)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    jaxpr = jax.make_jaxpr(residuals)(params, variables, ids, flags, flags, seed).jaxpr
    made = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - {*jaxpr.invars}
    return _bytes(v.aval for v in made)

  return kept(2) - kept(1)  # what is the same for all rows is in both


def _bytes(arrays: Any) -> int:
  return sum(a.size * a.dtype.itemsize for a in arrays)
