"""The Legendre Memory Unit of the spiking LMUFormer."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from triform import kernels

from ..interface import SequenceModule, state_dtype
from ..layers.ahead import answer_ahead
from ..layers.batch_norm import BatchNorm
from ..layers.normed import NormedLinear, uniform_init
from .lmu import check_memory


class SpikingLMUState(NamedTuple):
  """The memory, which is analog, and the potentials of the neurons around it."""

  memory: jax.Array  # [b, c, n]
  potentials: tuple[jax.Array, ...]


class SpikingLMU(SequenceModule):
  """A Legendre memory that spikes go into and are read from (LMUFormer, arXiv 2402.04882).

      s = LIF(BN(x))          u = LIF(BN(W_u s + b))          m_t = Abar m_{t-1} + Bbar u_t
      z = LIF(BN(m))          h = LIF(BN(W_h [z; s] + b))     y = BN(W_o h + b)

  as in the published code of the variant `"spiking_ms"`; with `"spiking"` there is no `s` (it is
  x), and y is `LIF(BN(W_o h + b))`. The memory is real-valued and never fed back. All of it hangs
  on the `channels` neurons of u, one as published: `arch.spiking` tells whether they spike.
  """

  def __init__(
    self,
    d_model: int,
    *,
    order: int,
    theta: float,
    channels: int = 1,
    variant: Literal["spiking_ms", "spiking"],
    make_neuron: Callable[..., nnx.Module],
    kernel_init: Any,
    chunk_size: int,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    check_memory(theta, order=order, channels=channels, chunk_size=chunk_size)
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    options = {**dtypes, "rngs": rngs}
    self.order, self.theta, self.channels = order, float(theta), channels
    self.d_model, self.chunk_size = d_model, chunk_size
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    memory = channels * order
    normed = variant == "spiking_ms"
    self.input_norm = BatchNorm(d_model, **dtypes) if normed else None
    self.input_neuron = make_neuron(d_model, threshold=0.5) if normed else None
    self.output_neuron = None if normed else make_neuron(d_model)
    self.input = NormedLinear(d_model, channels, kernel_init=kernel_init, **options)
    self.write_neuron = make_neuron(channels)
    self.memory_norm = BatchNorm(memory, **dtypes)
    self.memory_neuron = make_neuron(memory)
    self.hidden = NormedLinear(memory + d_model, d_model, kernel_init=kernel_init, **options)
    self.hidden_neuron = make_neuron(d_model)
    self.output = NormedLinear(d_model, d_model, kernel_init=uniform_init, **options)

  def _neurons(self):
    """In the order of their potentials."""
    neurons = (
      self.input_neuron,
      self.write_neuron,
      self.memory_neuron,
      self.hidden_neuron,
      self.output_neuron,
    )
    return [neuron for neuron in neurons if neuron is not None]

  def init_state(self, batch_size, *, max_len=None):
    memory = jnp.zeros((batch_size, self.channels, self.order), state_dtype(self.dtype))
    return SpikingLMUState(memory, tuple(n.init_state(batch_size) for n in self._neurons()))

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, ahead=0):
    before = None if state is None else state.memory
    state = self.init_state(x.shape[0]) if state is None else state
    potentials = []

    def fire(neuron, x):
      v = state.potentials[len(potentials)]
      x, v = neuron(x, v, reset=reset, mask=mask, ahead=ahead, rngs=rngs)
      potentials.append(v)
      return x

    def remember(memory, u, reset, mask):
      return kernels.lmu(
        u,
        order=self.order,
        theta=self.theta,
        state=memory,
        reset=reset,
        mask=mask,
        form=form,
        chunk_size=self.chunk_size,
      )

    batch = {"mask": mask, "rngs": rngs}
    if self.input_neuron is not None:
      x = fire(self.input_neuron, self.input_norm(x, **batch))
    u = fire(self.write_neuron, self.input(x, **batch))
    m, memory = answer_ahead(remember, ahead, before, u, reset, mask)
    m = self.memory_norm(m.reshape(*x.shape[:2], -1), **batch)
    z = fire(self.memory_neuron, m)
    h = self.hidden(jnp.concatenate([z, x.astype(z.dtype)], axis=-1), **batch)
    y = self.output(fire(self.hidden_neuron, h), **batch)
    if self.output_neuron is not None:
      y = fire(self.output_neuron, y)
    return y, SpikingLMUState(memory.astype(state.memory.dtype), tuple(potentials))
