"""LMUFormer (arXiv 2402.04882): convolutions, Legendre memories, classes; plain and spiking."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import SequenceModule, State, copy_traits
from ..layers.audio import make_front_end
from ..layers.batch_norm import BatchNorm
from ..layers.conv_stem import ConvStem, Padding, Variant
from ..layers.linear import Linear
from ..layers.normed import NormedLinear, uniform_init
from ..layers.spiking import LIF
from ..mixers.lmu import LMU
from ..mixers.spiking_lmu import SpikingLMU
from .classifier import Classifier
from .registry import register
from .stack import Stack

LINEAR_INIT = nnx.initializers.truncated_normal(0.02)  # as the published code draws

SMALL = {
  "in_features": 3, "num_classes": 3, "d_model": 8, "num_layers": 2, "mlp_ratio": 2, "order": 4,
  "theta": 6.0, "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("lmuformer", small=SMALL, task="classification")
class LMUFormer(Classifier):
  """Frames `[b, t, in_features]` to logits `[b, num_classes]` of all that was heard.

      x = stem(frames)       x <- x + lmu(x)       x <- x + ffn(x)       logits = mean_t W x_t + b

  Variants are `"plain"`, `"spiking_ms"` (the published spiking one, whose residual stream is
  real-valued) and `"spiking"` (whose residuals are sums of spikes). See `ConvStem`, `LMU` and
  `SpikingLMU` for what they compute; feed-forwards are two layers with batch norms, of
  `mlp_ratio * d_model` hidden units.

  Args:
    front_end: makes frames of audio, and inputs are samples `[b, n]`: `"fbank"`, or `"mfcc"`, with
      options as in `"fbank(frame_shift=20.0)"`, see `make_front_end`.
    padding: of the convolutions: `"causal"`, ours, or `"same"`, as published. With that a call
      gives the published logits of everything heard so far, however it was cut, `lookahead` is 5
      frames, and `encode` gives features five frames late; see `Classifier`.
    stem_channels: of the first convolutions, which then share their weights over frequency, ours;
      none as published.
    order: of the memories; as published d_model, or 2 d_model in spiking variants.
    theta: length of their window in frames.
    memory_channels: of every memory; 1 as published.
    dropout: of what blocks add.
    tau, learn_tau, threshold, reset_value, surrogate, slope, detach_reset: of spiking neurons, see
      `LIF`.
    chunk_size: of the memory's chunkwise form.
  """

  def __init__(
    self,
    *,
    front_end: str | None = None,
    in_features: int = 128,
    num_classes: int = 35,
    d_model: int = 256,
    num_layers: int = 1,
    mlp_ratio: int = 4,
    variant: Variant = "plain",
    padding: Padding = "causal",
    stem_channels: tuple[int, ...] = (),
    order: int | None = None,
    theta: float = 128.0,
    memory_channels: int = 1,
    dropout: float = 0.0,
    tau: float = 2.0,
    learn_tau: bool = False,
    threshold: float = 1.0,
    reset_value: float | None = 0.0,
    surrogate: str = "sigmoid",
    slope: float | None = None,
    detach_reset: bool = True,
    chunk_size: int = 32,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    for name, value, known in (("variant", variant, Variant), ("padding", padding, Padding)):
      if value not in get_args(known):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}")
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}
    make_neuron = functools.partial(
      LIF,
      tau=tau,
      learn_tau=learn_tau,
      threshold=threshold,
      reset_value=reset_value,
      surrogate=surrogate,
      slope=slope,
      detach_reset=detach_reset,
      **dtypes,
    )
    self.variant, self.theta = variant, theta
    if order is None:
      order = d_model if variant == "plain" else 2 * d_model
    memory = {"order": order, "theta": theta, "channels": memory_channels, "chunk_size": chunk_size}
    make_block = functools.partial(
      _make_block, d_model, mlp_ratio * d_model, variant, make_neuron, memory, dropout, dtypes
    )
    neuron = None
    if variant == "spiking_ms":
      neuron = NormedNeuron(d_model, make_neuron, **dtypes)
    super().__init__(
      ConvStem(
        in_features,
        d_model,
        variant=variant,
        padding=padding,
        channels=stem_channels,
        make_neuron=make_neuron,
        **dtypes,
        rngs=rngs,
      ),
      Stack(make_block, num_layers, scan=scan_layers, remat=remat, rngs=rngs),
      front_end=make_front_end(front_end, in_features, dtypes["dtype"]),
      neuron=neuron,
      d_model=d_model,
      num_classes=num_classes,
      kernel_init=LINEAR_INIT,
      **dtypes,
      rngs=rngs,
    )


def _make_block(d_model, hidden, variant, make_neuron, memory, dropout, dtypes, rngs):
  options = {**dtypes, "rngs": rngs}
  if variant == "plain":
    return LMUFormerBlock(
      NormedLMU(d_model, **memory, **options), PlainFeedForward(d_model, hidden, **options), dropout
    )
  spiking = {"variant": variant, "make_neuron": make_neuron, **options}
  return LMUFormerBlock(
    SpikingLMU(d_model, kernel_init=LINEAR_INIT, **memory, **spiking),
    SpikingFeedForward(d_model, hidden, **spiking),
    dropout,
  )


class BlockState(NamedTuple):
  mixer: State
  feed_forward: State


class LMUFormerBlock(SequenceModule):
  """`x + mixer(x)`, then `x + feed_forward(x)`, either with dropout."""

  def __init__(self, mixer: SequenceModule, feed_forward: SequenceModule, dropout: float):
    self.mixer, self.feed_forward = mixer, feed_forward
    self.dropout = nnx.Dropout(dropout)
    copy_traits(self, mixer, feed_forward)

  def init_state(self, batch_size, *, max_len=None):
    return BlockState(self.mixer.init_state(batch_size), self.feed_forward.init_state(batch_size))

  def __call__(self, x, state=None, *, rngs=None, **options):
    after = []
    states = (None, None) if state is None else state
    for part, before in zip((self.mixer, self.feed_forward), states, strict=True):
      y, own = part(x, before, rngs=rngs, **options)
      x = x + self.dropout(y, rngs=rngs, deterministic=rngs is None)
      after.append(own)
    return x, BlockState(*after)


class NormedLMU(SequenceModule):
  """`BatchNorm(W_o lmu(x) + b)`."""

  def __init__(self, d_model: int, *, dtype, param_dtype, rngs, **memory: Any):
    options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.lmu = LMU(d_model, hidden_size=d_model, kernel_init=LINEAR_INIT, **memory, **options)
    self.output = NormedLinear(d_model, d_model, kernel_init=uniform_init, **options)

  def init_state(self, batch_size, *, max_len=None):
    return self.lmu.init_state(batch_size)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, ahead=0):
    y, state = self.lmu(x, state, form=form, reset=reset, mask=mask, ahead=ahead)
    return self.output(y, mask=mask, rngs=rngs), state


class PlainFeedForward(SequenceModule):
  """`relu(BN(W_2 gelu(BN(W_1 x + b_1)) + b_2))`."""

  def __init__(self, d_model: int, hidden: int, *, dtype, param_dtype, rngs):
    options = {"kernel_init": uniform_init, "dtype": dtype, "param_dtype": param_dtype}
    self.input = NormedLinear(d_model, hidden, **options, rngs=rngs)
    self.output = NormedLinear(hidden, d_model, **options, rngs=rngs)

  def init_state(self, batch_size, *, max_len=None):
    return ()

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, ahead=0):
    hidden = jax.nn.gelu(self.input(x, mask=mask, rngs=rngs), approximate=False)
    return jax.nn.relu(self.output(hidden, mask=mask, rngs=rngs)), ()


class SpikingFeedForward(SequenceModule):
  """`W_2 LIF(BN(W_1 LIF(BN(x))))`, or of the variant `"spiking"` `LIF(BN(W_2 LIF(BN(W_1 x))))`."""

  def __init__(
    self,
    d_model: int,
    hidden: int,
    *,
    variant: str,
    make_neuron: Callable[[int], LIF],
    dtype,
    param_dtype,
    rngs,
  ):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    options = {"kernel_init": uniform_init, **dtypes, "rngs": rngs}
    normed = variant == "spiking_ms"
    self.input_neuron = NormedNeuron(d_model, make_neuron, **dtypes) if normed else None
    self.output_neuron = None if normed else make_neuron(d_model)
    self.output = (Linear if normed else NormedLinear)(hidden, d_model, use_bias=True, **options)
    self.input = NormedLinear(d_model, hidden, **options)
    self.hidden_neuron = make_neuron(hidden)

  def _neurons(self):
    """In the order of their potentials."""
    neurons = (self.input_neuron, self.hidden_neuron, self.output_neuron)
    return [neuron for neuron in neurons if neuron is not None]

  def init_state(self, batch_size, *, max_len=None):
    return tuple(neuron.init_state(batch_size) for neuron in self._neurons())

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, ahead=0):
    state = self.init_state(x.shape[0]) if state is None else state
    after = []

    def fire(neuron, x):
      x, v = neuron(x, state[len(after)], reset=reset, mask=mask, ahead=ahead, rngs=rngs)
      after.append(v)
      return x

    if self.input_neuron is not None:
      x = fire(self.input_neuron, x)
    x = fire(self.hidden_neuron, self.input(x, mask=mask, rngs=rngs))
    if self.output_neuron is None:
      return self.output(x), tuple(after)
    return fire(self.output_neuron, self.output(x, mask=mask, rngs=rngs)), tuple(after)


class NormedNeuron(SequenceModule):
  """`LIF(BN(x))`."""

  def __init__(self, d_model: int, make_neuron: Callable[[int], LIF], *, dtype, param_dtype):
    self.norm = BatchNorm(d_model, dtype=dtype, param_dtype=param_dtype)
    self.neuron = make_neuron(d_model)

  def init_state(self, batch_size, *, max_len=None):
    return self.neuron.init_state(batch_size)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, ahead=0):
    y = self.norm(x, mask=mask, rngs=rngs)
    return self.neuron(y, state, reset=reset, mask=mask, ahead=ahead, rngs=rngs)
