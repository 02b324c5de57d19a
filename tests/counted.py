"""Programs whose operations are counted, from shapes alone."""

import jax
import jax.numpy as jnp
from flax import nnx

from triform.arch import build
from triform.arch.flops import Call, Work, count, walk
from triform.arch.layout import split_model
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


def gradient(model, call: Call, x) -> tuple[Work, Work]:
  """A module of vectors `x` in training: its outputs, and these with gradients of given ones."""
  graphdef, params, rest = split_model(model)
  flags = jax.ShapeDtypeStruct(x.shape[:2], bool)
  reset = flags if call.packed else None

  def run(params, rest, x, reset, mask):
    whole = nnx.merge(graphdef, params, rest)
    return whole(x, form=call.form, reset=reset, mask=mask, rngs=nnx.Rngs(0))[0]

  def differentiate(params, rest, x, reset, mask, cotangent):
    y, pull = jax.vjp(lambda params, x: run(params, rest, x, reset, mask), params, x)
    return y, pull(cotangent)

  arguments = (params, rest, x, reset, flags)
  y = jax.eval_shape(run, *arguments)
  return walk(run, *arguments), walk(differentiate, *arguments, y)


def classified(model, call: Call, x) -> Work:
  """What a classifier computes of given inputs: logits and state, or the gradients of logits."""
  graphdef, params, rest = split_model(model)

  def infer(params, rest, x, state):
    return nnx.merge(graphdef, params, rest)(x, state, form=call.form)

  def differentiate(params, rest, x, mask, seed, cotangent):
    def logits(params):
      rngs = nnx.Rngs(jax.random.key(seed))
      return nnx.merge(graphdef, params, rest)(x, form=call.form, mask=mask, rngs=rngs)[0]

    y, pull = jax.vjp(logits, params)
    return y, pull(cotangent)

  if call.training:
    mask = jax.ShapeDtypeStruct(x.shape[:2], bool)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    cotangent = jax.ShapeDtypeStruct((1, model.head.out_features), jnp.float32)
    return walk(differentiate, params, rest, x, mask, seed, cotangent)
  state = None
  if call.context:
    state = jax.eval_shape(lambda: nnx.merge(graphdef, params, rest).init_state(1))
  return walk(infer, params, rest, x, state)


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
