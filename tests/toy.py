"""A block with what couples tokens in training: batch statistics and dropout."""

from flax import nnx

from triform.arch import Retention, SequenceModule


class ToyBlock(SequenceModule):
  """`x + dropout(mixer(batch_norm(x)))`."""

  def __init__(self, d_model, *, dtype, param_dtype, rngs):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    self.norm = nnx.BatchNorm(d_model, momentum=0.9, **dtypes, rngs=rngs)
    self.mixer = Retention(d_model, num_heads=2, chunk_size=4, **dtypes, rngs=rngs)
    self.dropout = nnx.Dropout(0.3)

  def init_state(self, batch_size, *, max_len=None):
    return self.mixer.init_state(batch_size, max_len=max_len)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    normed = self.norm(
      x, use_running_average=rngs is None, mask=None if mask is None else mask[..., None]
    )
    y, state = self.mixer(normed, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return x + self.dropout(y, rngs=rngs, deterministic=rngs is None), state
