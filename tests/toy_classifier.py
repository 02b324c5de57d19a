"""A classifier of sequences that is small enough for tests, and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform.arch import SequenceModule
from triform.arch.flops import Call, Count, Work, count
from triform.arch.layers.linear import Linear
from triform.arch.models.registry import register

SIDE = 28


@register("linear_classifier", small={"width": 4}, task="classification")
class ToyClassifier(SequenceModule):
  """A linear layer of every step, batch norm, the mean of what is positive, dropout, a layer."""

  causal = False

  def __init__(
    self,
    *,
    steps: int = SIDE**2,
    num_classes: int = 10,
    width: int = 16,
    dropout: float = 0.0,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    # Every step has a weight of its own, or what is seen would not depend on the order.
    self.kernel = nnx.Param(nnx.initializers.normal(0.05)(rngs.params(), (steps, width)))
    self.norm = nnx.BatchNorm(width, param_dtype=param_dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout)
    self.output = Linear(width, num_classes, use_bias=True, param_dtype=param_dtype, rngs=rngs)

  def init_state(self, batch_size, *, max_len=None):
    return ()

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    x = x if mask is None else jnp.where(mask[..., None], x, 0)
    hidden = jnp.einsum("btc,tw->bw", x, self.kernel[...][: x.shape[1]])
    hidden = jax.nn.relu(self.norm(hidden, use_running_average=rngs is None))
    hidden = self.dropout(hidden, rngs=rngs, deterministic=rngs is None)
    return self.output(hidden).astype(jnp.float32), ()


@count.register
def _(model: ToyClassifier, call: Call) -> Count:
  flops = 2 * call.length * model.norm.num_features
  return Count(Work(matmul=flops), Work(matmul=flops)) + count(
    model.output, call._replace(length=1)
  )


def write_mnist(folder, train=120, test=30, name="{}-{}"):
  """Files of digits that are easily told apart: class c has a bright row 2 c."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for split, number in (("train", train), ("t10k", test)):
    classes = rng.integers(0, 10, number, dtype=np.uint8)
    images = rng.integers(0, 60, (number, SIDE, SIDE), dtype=np.uint8)
    images[np.arange(number), 2 * classes] = 255
    write_idx(folder / name.format(f"{split}-images", "idx3-ubyte"), images)
    write_idx(folder / name.format(f"{split}-labels", "idx1-ubyte"), classes)
  return folder


def write_idx(path, array):
  header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
  path.write_bytes(header + array.tobytes())
