"""The modules held to the laws. A new architecture adds a `register` call here."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from laws_bench import SUBJECTS, distinct_ids, register, vectors
from laws_kernels import ByKernel
from toy import ToyBlock

from triform.arch import (
  Attention,
  Block,
  CausalHyperMixing,
  HyperMixing,
  MultiDConvHeadAttention,
  Retention,
  RetentionState,
  SequenceModule,
  Stack,
)
from triform.arch.layers.batch_norm import BatchNorm
from triform.arch.layers.feed_forward import GatedFeedForward
from triform.arch.mixers.lmu import LMU
from triform.arch.mixers.retention import log_decays, rotary_angles
from triform.arch.models.lmuformer import LMUFormer
from triform.arch.models.registry import ARCHITECTURES
from triform.kernels import rotary_steps
from triform.kernels.retention import reference

__all__ = ["SUBJECTS", "D"]  # all registered, for who takes them from here

D = 8


def retention_oracle(variables, x, state, reset, mask, *, dialect, eps=1e-6):
  """`Retention` with a fixed decay, a token and a row at a time, as the paper prints it."""
  kernel = {name: p["kernel"] for name, p in variables.items() if isinstance(p, dict)}
  h = state.kv.shape[1]
  log_decay = log_decays(h, "geometric")
  steps = [int(s) for s in rotary_steps(rotary_angles(state.kv.shape[2], dialect))]
  x, (b, t, _) = x.astype(np.float64), x.shape
  widths = {"query": 2 * len(steps), "key": 2 * len(steps), "value": len(kernel["output"]) // h}
  q, k, v = ((x @ kernel[name]).reshape(b, t, -1, width) for name, width in widths.items())
  positions, after = np.zeros((b, t), object), []
  for row, seen in enumerate(state.position):
    seen = int(seen)
    for n in range(t):
      if mask[row, n]:
        seen = 0 if reset[row, n] else seen
        positions[row, n] = seen
        seen += 1
    after.append(seen % 2**32)

  def rotate(a):
    turns = [[[p * s % 2**32 / 2**32 for s in steps] for p in row] for row in positions]
    first, second = np.split(a, 2, axis=-1)
    turned = (first + 1j * second) * np.exp(2j * np.pi * np.array(turns))[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)

  o, kv = reference.retention(
    rotate(q),
    rotate(k) / np.sqrt(2 * len(steps)),
    v,
    log_decay,
    state=state.kv,
    reset=reset,
    mask=mask,
  )
  count = positions.astype(np.float64)[..., None] + 1
  scale = 1.0
  if dialect == "torchscale":
    scale = (np.expm1(log_decay * count) / np.expm1(log_decay))[..., None]
  o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + eps * scale)
  o = (o * variables.get("norm_weight", 1.0)).reshape(b, t, -1)
  gate = x @ kernel["gate"]
  return (gate / (1 + np.exp(-gate)) * o) @ kernel["output"], RetentionState(kv, np.uint32(after))


def retention(**options):
  return functools.partial(Retention, D, **{"num_heads": 2, "chunk_size": 4} | options)


def oracle(dialect):
  return functools.partial(retention_oracle, dialect=dialect)


def block(dtype, param_dtype, rngs, dropout=0.0):
  dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
  return Block(
    mixer_norm=nnx.RMSNorm(D, **dtypes),
    mixer=retention()(**dtypes),
    feed_forward_norm=nnx.RMSNorm(D, **dtypes),
    feed_forward=GatedFeedForward(D, 12, **dtypes),
    dropout=dropout,
  )


def stack(scan, one):
  def make(dtype, param_dtype, rngs):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    return Stack(lambda r: one(**dtypes, rngs=r), 2, scan=scan, rngs=rngs)

  return make


def attention(mixer=Attention, **options):
  return functools.partial(mixer, D, **{"num_heads": 2, "max_len": 32, "chunk_size": 4} | options)


def hypermixing(mixer, **options):
  return functools.partial(
    mixer, D, **{"num_heads": 2, "mixing_dim": 12, "chunk_size": 4} | options
  )


class Bidirectional(SequenceModule):
  """A module that sees whole sequences, told of no documents in them."""

  causal = False

  def __init__(self, module):
    self.module = module

  def init_state(self, batch_size, *, max_len=None):
    return self.module.init_state(batch_size)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    return self.module(x, state, form=form, mask=mask, rngs=rngs)


class Recurrent(SequenceModule):
  """A module that has no form but the recurrent one."""

  def __init__(self, module):
    self.module = module

  def init_state(self, batch_size, *, max_len=None):
    return self.module.init_state(batch_size)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    return self.module(x, state, form="recurrent", reset=reset, mask=mask, rngs=rngs)


class Encoder(SequenceModule):
  """What a classifier takes the mean of."""

  def __init__(self, model):
    self.model = model

  def init_state(self, batch_size, *, max_len=None):
    return self.model.init_state(batch_size)

  def __call__(self, x, state=None, **options):
    return self.model.encode(x, state, **options)


def voelker(dtype, param_dtype, rngs):
  """The unit of Voelker et al. (NeurIPS 2019)."""
  dtypes = {"dtype": dtype, "param_dtype": param_dtype}
  return Recurrent(
    LMU(
      D,
      order=4,
      theta=6.0,
      hidden_cell=functools.partial(nnx.SimpleCell, hidden_features=D, **dtypes),
      input_activation="linear",
      hidden_to_memory=True,
      memory_to_memory=True,
      use_bias=False,
      **dtypes,
      rngs=rngs,
    )
  )


def lmuformer(**options):
  sizes = {"in_features": 6, "num_classes": 3, "d_model": D, "num_layers": 1, "mlp_ratio": 2}
  memory = {"order": 4, "theta": 6.0, "memory_channels": 2, "chunk_size": 4}
  return lambda **dtypes: Encoder(awake(LMUFormer(**sizes, **memory, **options, **dtypes)))


def awake(model):
  """A model that no token is lost in.

  Its neurons spike: what batch norms give out is about as large as a threshold. Of rectifiers there
  are pairs of opposite sign.
  """
  if model.variant == "plain":
    for layer in model.stem.convs:
      half = layer.kernel[..., : layer.out_features // 2]
      layer.kernel[...] = jnp.concatenate([half, -half], axis=-1)
    return model
  for _, norm in nnx.iter_graph(model):
    if isinstance(norm, BatchNorm):
      norm.scale[...] = jnp.full_like(norm.scale[...], 4.0)
      norm.bias[...] = jnp.full_like(norm.bias[...], 1.0)
  return model


def bidirectional(name, make, inputs, **options):
  register(name, lambda **o: Bidirectional(make(**o)), inputs, causal=False, **options)


def by_kernel(make):
  return lambda **dtypes: ByKernel(make(**dtypes), dtypes["dtype"])


def register_architecture(name, variant="", *, slow=False, **options):
  """A language model that `models.registry` knows, as it is small; `options` make a variant."""
  architecture = ARCHITECTURES[name]
  sizes = {**architecture.small, **options}
  register(
    "-".join(filter(None, (name, variant))),
    functools.partial(architecture.model, **sizes),
    distinct_ids(sizes["vocab_size"]),
    table=lambda parameters: parameters["embedding"]["embedding"],
    slow=slow,
  )


register("retention-fixed", retention(), vectors(D), oracle=oracle("torchscale"))
register("retention-learned", retention(decay="learned"), vectors(D), slow=True)
register("retention-gated", retention(decay="gated"), vectors(D))
register("retention-fla", retention(dialect="fla"), vectors(D), oracle=oracle("fla"), slow=True)
register("retention-grouped", retention(num_heads=4, num_kv_heads=2), vectors(D), slow=True)
register("block", functools.partial(block, dropout=0.3), vectors(D), trains=True, slow=True)
register("stack-scanned", stack(True, retention()), vectors(D), slow=True)
register("stack-unrolled", stack(False, retention()), vectors(D), slow=True)
register("toy", functools.partial(ToyBlock, D), vectors(D), trains=True, slow=True)
register("toy-scanned", stack(True, functools.partial(ToyBlock, D)), vectors(D), trains=True)
register("attention-rotary", attention(num_heads=4, num_kv_heads=2), vectors(D), slow=True)
register("attention-relative", attention(position="relative"), vectors(D), slow=True)
register("attention-window", attention(window=3), vectors(D), slow=True)
register(
  "mdha-window",
  attention(MultiDConvHeadAttention, window=3, num_kv_heads=1),
  vectors(D),
  slow=True,
)
register(
  "mdha-shared",
  attention(MultiDConvHeadAttention, shared_qk=True, position="relative", scale=1.0),
  vectors(D),
  slow=True,
)
register("hypermixing-causal", hypermixing(CausalHyperMixing), vectors(D), slow=True)
for normalizer in ("mean", "variance", "row_rms", "head_rms"):
  register(
    f"hypermixing-{normalizer}",
    hypermixing(CausalHyperMixing, normalizer=normalizer, decay="fixed", use_bias=True),
    vectors(D),
    slow=True,
  )
bidirectional(
  "hypermixing-official", hypermixing(HyperMixing, position="official", tied=True), vectors(D)
)
bidirectional(
  "hypermixing-none",
  hypermixing(HyperMixing, position="none", activation="relu", use_bias=True),
  vectors(D),
  slow=True,
)
# XLA for CPU rounds a product with a single column differently from row to row: two channels.
unit = functools.partial(LMU, D, order=4, theta=6.0, channels=2, hidden_size=D, chunk_size=4)
register("lmu-unit", unit, vectors(D))
register(
  "lmu-channels",
  functools.partial(
    unit, channels=3, theta=24.0, hidden_activation="tanh", discretizer="euler", learn_theta=True
  ),
  vectors(D),
  slow=True,
)
register("lmu-cell", voelker, vectors(D), slow=True)
register("lmuformer", lmuformer(dropout=0.3), vectors(6), trains=True)
register(
  "lmuformer-spiking", lmuformer(variant="spiking_ms"), vectors(6), trains=True, spikes=True,
  slow=True,
)  # fmt: skip
register_architecture("retnet")
register_architecture("hypermixer", scan_layers=True)
register_architecture("retnet", "fla", dialect="fla", scan_layers=True, slow=True)
register_architecture("transformer", scan_layers=True, dropout=0.3, slow=True)
register_architecture("transformer++", window=5, num_kv_heads=1, slow=True)
register_architecture("primer", scan_layers=True)
register_architecture("lmu", scan_layers=True)
register_architecture("hybrid", scan_layers=True, slow=True)
register_architecture(
  "hybrid",
  "rest",
  pattern="retention, attention(window=3)",
  num_layers=3,
  scan_layers=True,
  slow=True,
)
for decay, options in (("fixed", {}), ("gated", {"num_kv_heads": 1})):
  register(
    f"kernel-{decay}",
    by_kernel(retention(key_dim=128, value_dim=128, decay=decay, **options)),
    vectors(D),
    slow=decay == "gated",
    kernel=True,
  )
small = {**ARCHITECTURES["retnet"].small, "key_dim": 128, "value_dim": 128, "scan_layers": True}
register(
  "kernel-retnet",
  by_kernel(functools.partial(ARCHITECTURES["retnet"].model, **small)),
  distinct_ids(small["vocab_size"]),
  table=lambda parameters: parameters["module"]["embedding"]["embedding"],
  slow=True,
  kernel=True,
)
