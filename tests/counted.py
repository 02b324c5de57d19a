"""Programs whose operations are counted, from shapes alone."""

import jax
import jax.numpy as jnp
from flax import nnx

from triform.arch import build
from triform.arch.flops import Call, Work, count, walk
from triform.arch.training.losses import cross_entropy


def abstract(config):
  return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def calls(length, form):
  """A training step, a prefill and a continuation."""
  return (
    Call(length, form, training=True),
    Call(length, form),
    Call(length, form, context=3),
  )


def closed(model, call: Call) -> Work:
  counted = count(model, call)
  return (
    counted.forward + counted.backward + counted.recompute if call.training else counted.forward
  )


def traced(model, call: Call) -> Work:
  """What the program that `call` describes computes."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  ids = jax.ShapeDtypeStruct((1, call.length), jnp.int32)
  flags = jax.ShapeDtypeStruct(ids.shape, bool)

  def infer(params, rest, ids, state):
    return nnx.merge(graphdef, params, rest)(ids, state, form=call.form)

  def loss(params, rest, ids, targets, reset, mask, seed):
    whole = nnx.merge(graphdef, params, rest)
    rngs = nnx.Rngs(jax.random.key(seed))
    features, _ = whole.encode(ids, form=call.form, reset=reset, mask=mask, rngs=rngs)
    return cross_entropy(whole.read_out, features, targets, mask)[0]

  if call.training:
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return walk(jax.value_and_grad(loss), params, rest, ids, ids, flags, flags, seed)
  state = None
  if call.context:
    room = call.context + call.length
    state = jax.eval_shape(lambda: nnx.merge(graphdef, params, rest).init_state(1, max_len=room))
  return walk(infer, params, rest, ids, state)
