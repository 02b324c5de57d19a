"""Legendre Memory Units: a linear memory of a sliding window, and what is made of it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.initializers import Initializer
from jax.ad_checkpoint import checkpoint_name

from triform import kernels
from triform.kernels.lmu import DISCRETIZERS, Discretizer

from ..interface import SequenceModule, check_call, state_dtype
from ..layers.ahead import answer_ahead
from ..layers.linear import PRODUCT, Linear

ACTIVATIONS = {
  "linear": lambda x: x,
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def check_memory(theta: float, **sizes: int) -> None:
  """Raises `ValueError` for a window that is not positive, or a size below 1, by its name."""
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"{name} is {size}, expected at least 1")
  if not 0 < theta < float("inf"):
    raise ValueError(f"theta is {theta}, expected a positive number of tokens")


class LMUState(NamedTuple):
  """The memory, in at least float32, and what the hidden cell carries."""

  memory: jax.Array  # [b, c, n]
  hidden: Any  # the carry of a recurrent cell, or the last output if it is fed back; else ()


class LMU(SequenceModule):
  """A Legendre Memory Unit, with any of the options that its publications have.

      u_t = f(W_u x_t + b_u)      m_t = Abar m_{t-1} + Bbar u_t      y_t = g(W_h [m_t; x_t] + b_h)

  With these defaults it is the one of Chilkuri and Eliasmith (ICML 2021; "LMUFFT"), whose memory is
  a convolution; `f` and `g` are rectifiers. That of Voelker et al. (NeurIPS 2019) feeds the
  nonlinear output back into the memory, and so is recurrent only: `hidden_to_memory`,
  `memory_to_memory`, no biases, no activation of u, and a recurrent hidden cell. Options in between
  are those of KerasLMU. See `triform.kernels.lmu` for the memory and its forms.

  Args:
    d_model: width of inputs.
    order: Legendre coefficients n of every memory channel.
    theta: length of the remembered window in tokens; where it is learned, at the start.
    channels: of the memory, each with an input of its own; all have one theta.
    hidden_size: width of outputs. `None`, without a `hidden_cell`, gives out the memory itself,
      `[b, t, channels * order]` channel by channel, and behind it the inputs if `input_to_hidden`.
    hidden_cell: `hidden_cell(features, rngs=)` makes a recurrent cell in place of the linear layer,
      an `nnx.RNNCellBase` whose output is the last array of its carry, such as `nnx.GRUCell`.
    input_activation, hidden_activation: f and g, `"linear"`, `"relu"`, `"tanh"` or `"gelu"`.
    input_to_hidden: the output sees the input too, behind the memory.
    hidden_to_memory: u sees the output before, behind the input: `W_u [x_t; y_{t-1}]`.
    memory_to_memory: u sees the memory before: `+ W_m m_{t-1}`.
    discretizer: `"zoh"`, or `"euler"`, which needs theta above about 4 n.
    learn_theta: `theta = exp(log_theta)` is a parameter; the tables are then made in every call.
    use_bias: of u; `hidden_bias` of the linear layer.
    kernel_init: of all linear layers.
    chunk_size: tokens in a chunk of the chunkwise form.
    dtype: of the computation; `None` is `param_dtype`. The memory and what it is multiplied by are
      in at least float32.

  With feedback the parallel and chunkwise forms raise `NotImplementedError`.
  """

  def __init__(
    self,
    d_model: int,
    *,
    order: int,
    theta: float,
    channels: int = 1,
    hidden_size: int | None = None,
    hidden_cell: Callable[..., nnx.Module] | None = None,
    input_activation: str = "relu",
    hidden_activation: str = "relu",
    input_to_hidden: bool = True,
    hidden_to_memory: bool = False,
    memory_to_memory: bool = False,
    discretizer: Discretizer = "zoh",
    learn_theta: bool = False,
    use_bias: bool = True,
    hidden_bias: bool = True,
    kernel_init: Initializer | None = None,
    chunk_size: int = 32,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    sizes = {"d_model": d_model, "order": order, "channels": channels, "chunk_size": chunk_size}
    check_memory(theta, **sizes, hidden_size=1 if hidden_size is None else hidden_size)
    for name, value, known in (
      ("input_activation", input_activation, ACTIVATIONS),
      ("hidden_activation", hidden_activation, ACTIVATIONS),
      ("discretizer", discretizer, DISCRETIZERS),
    ):
      if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if hidden_size is not None and hidden_cell is not None:
      raise ValueError("hidden_size and hidden_cell are both given, expected at most one")
    if hidden_to_memory and hidden_size is None and hidden_cell is None:
      raise ValueError("hidden_to_memory needs a hidden_size or a hidden_cell, whose output it is")
    self.d_model, self.order, self.channels = d_model, order, channels
    self.hidden_size = hidden_size
    self.input_activation, self.hidden_activation = input_activation, hidden_activation
    self.input_to_hidden, self.hidden_to_memory = input_to_hidden, hidden_to_memory
    self.discretizer, self.chunk_size = discretizer, chunk_size
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    linear = functools.partial(
      Linear,
      kernel_init=kernel_init or nnx.initializers.lecun_normal(),
      dtype=self.dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    memory = channels * order
    seen = memory + (d_model if input_to_hidden else 0)
    self.cell = None if hidden_cell is None else hidden_cell(seen, rngs=rngs)
    if self.cell is not None and not isinstance(self.cell, nnx.RNNCellBase):
      raise ValueError(f"hidden_cell makes a {type(self.cell).__name__}, expected a recurrent cell")
    self.input = linear(d_model, channels, use_bias=use_bias)
    self.read = None if hidden_size is None else linear(memory, hidden_size, use_bias=hidden_bias)
    skips = hidden_size is not None and input_to_hidden
    self.skip = linear(d_model, hidden_size) if skips else None
    output = self._output(self._carry(1)) if hidden_to_memory else None
    self.output_feedback = None if output is None else linear(output.shape[-1], channels)
    self.memory_feedback = linear(memory, channels) if memory_to_memory else None
    self.theta = float(theta)
    log_theta = jnp.log(jnp.asarray(theta, state_dtype(param_dtype)))
    self.log_theta = nnx.Param(log_theta) if learn_theta else None

  def init_state(self, batch_size, *, max_len=None):
    memory = jnp.zeros((batch_size, self.channels, self.order), state_dtype(self.dtype))
    return LMUState(memory, self._carry(batch_size))

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, ahead=0):
    """As in `SequenceModule`; the last `ahead` tokens are answered, the state is from before."""
    check_call(x, form, reset, mask)
    if x.shape[2:] != (self.d_model,):
      raise ValueError(f"x has shape {list(x.shape)}, expected [batch, time, {self.d_model}]")
    x = jnp.asarray(x, self.dtype)
    if mask is not None:
      x = jnp.where(jnp.asarray(mask)[..., None], x, 0)
    if self.output_feedback is None and self.memory_feedback is None:
      return self._forward(x, state, form, reset, mask, ahead)
    if form != "recurrent":
      raise NotImplementedError(
        f"form is {form!r}, but what the memory is fed depends on the output or the memory before, "
        "so that one token has to follow another; expected recurrent, or no hidden_to_memory and "
        "memory_to_memory"
      )
    state = self.init_state(x.shape[0]) if state is None else state
    return answer_ahead(self._with_feedback, ahead, state, x, reset, mask)

  def read_out(self, memory, x):  # [b, ..., c, n], [b, ..., d] -> [b, ..., hidden]
    """`y` of given memories and inputs, where it is no recurrent cell's."""
    memory = memory.reshape(*memory.shape[:-2], -1).astype(self.dtype)
    if self.read is None:
      return self._seen(memory, x)
    y = self.read(memory)
    return ACTIVATIONS[self.hidden_activation](y if self.skip is None else y + self.skip(x))

  def _seen(self, memory, x):
    return jnp.concatenate([memory, x], axis=-1) if self.input_to_hidden else memory

  def _forward(self, x, state, form, reset, mask, ahead):
    u = ACTIVATIONS[self.input_activation](self.input(x))
    kernel = None
    if self.read is not None:
      kernel = self.read.kernel[...].reshape(self.channels, self.order, -1)

    def remember(memory, u, reset, mask):
      return kernels.lmu(
        u,
        order=self.order,
        theta=self._theta(),
        discretizer=self.discretizer,
        kernel=None if kernel is None else kernel.astype(self.dtype),
        state=memory,
        reset=reset,
        mask=mask,
        form=form,
        chunk_size=self.chunk_size,
      )

    memory = None if state is None else state.memory
    m, memory = answer_ahead(remember, ahead, memory, u, reset, mask)
    if memory is None:  # all tokens are ahead
      memory = self.init_state(x.shape[0]).memory
    memory = memory.astype(state_dtype(self.dtype))
    if kernel is not None:
      m = checkpoint_name(m, PRODUCT)
      y = m if self.read.bias is None else m + self.read.bias[...].astype(m.dtype)[None, None]
      y = y if self.skip is None else y + self.skip(x)
      return ACTIVATIONS[self.hidden_activation](y), LMUState(memory, ())
    seen = self._seen(m.reshape(*x.shape[:2], -1).astype(self.dtype), x)
    if self.cell is None:
      return seen, LMUState(memory, ())
    carry = self._carry(x.shape[0]) if state is None else state.hidden
    y, carry = answer_ahead(self._run_cell, ahead, carry, seen, reset, mask)
    return y, LMUState(memory, carry)

  def _theta(self):
    return self.theta if self.log_theta is None else jnp.exp(self.log_theta[...])

  def _carry(self, b):
    """The first state of the hidden cell."""
    if self.cell is not None:
      carry = self.cell.initialize_carry((b, 1), nnx.Rngs(0))
      return jax.tree.map(lambda a: a.astype(state_dtype(self.dtype)), carry)
    if not self.hidden_to_memory:
      return ()
    return jnp.zeros((b, self.hidden_size), state_dtype(self.dtype))

  def _output(self, carry):
    return jax.tree.leaves(carry)[-1]

  def _step_cell(self, carry, seen):
    """The cell in its own dtype; its carry is held in at least float32."""
    after, y = self.cell(jax.tree.map(lambda a: a.astype(self.dtype), carry), seen)
    return jax.tree.map(lambda a, old: a.astype(old.dtype), after, carry), y

  def _run_cell(self, carry, seen, reset, mask):
    def step(carry, token):
      seen, reset, mask = token
      before = self._begun(carry, reset, mask)
      after, y = self._step_cell(before, seen)
      return _kept(after, carry, mask), y

    return _over_time(step, carry, (seen, reset, mask))

  def _with_feedback(self, state, x, reset, mask):
    def step(state, token):
      x, reset, mask = token
      before = self._begun(state, reset, mask)
      u = self.input(x)
      if self.output_feedback is not None:
        u += self.output_feedback(self._output(before.hidden).astype(self.dtype))
      if self.memory_feedback is not None:
        u += self.memory_feedback(before.memory.reshape(x.shape[0], -1).astype(self.dtype))
      u = ACTIVATIONS[self.input_activation](u)
      _, memory = kernels.lmu(
        u[:, None],
        order=self.order,
        theta=self._theta(),
        discretizer=self.discretizer,
        state=before.memory,
        form="recurrent",
      )
      if self.cell is None:
        y = self.read_out(memory, x)
        hidden = y.astype(state_dtype(self.dtype)) if self.hidden_to_memory else ()
      else:
        seen = self._seen(memory.reshape(x.shape[0], -1).astype(self.dtype), x)
        hidden, y = self._step_cell(before.hidden, seen)
      return _kept(LMUState(memory, hidden), state, mask), y

    return _over_time(step, state, (x, reset, mask))

  def _begun(self, state, reset, mask):
    """`state`, or the first one in rows where a document begins."""
    if reset is None:
      return state
    begins = reset if mask is None else reset & mask
    b = begins.shape[0]
    first = self.init_state(b) if isinstance(state, LMUState) else self._carry(b)
    return jax.tree.map(lambda a, old: jnp.where(_rows(begins, old), a, old), first, state)


def _over_time(step, state, tokens):
  tokens = jax.tree.map(lambda a: jnp.asarray(a).swapaxes(0, 1), tokens)
  state, y = jax.lax.scan(step, state, tokens)
  return y.swapaxes(0, 1), state


def _kept(new, old, mask):
  """The state of before in rows whose token is padding."""
  if mask is None:
    return new
  return jax.tree.map(lambda a, b: jnp.where(_rows(mask, b), a, b), new, old)


def _rows(flags, like):
  return flags.reshape(-1, *[1] * (like.ndim - 1))
