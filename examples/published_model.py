"""A RetNet mixer inside a published Flax model: GPT-2 of Hugging Face's transformers.

Its code is as it was installed from PyPI (`pip install -e ".[examples]"`); one assignment puts our
mixer where its attention was. Trained here on a page of Python, byte by byte, from nothing.

    python examples/published_model.py
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_flax_gpt2 as gpt2

from triform.arch import linen


class RetentionForGPT2(nn.Module):
  """Retention with the arguments of GPT-2's attention."""

  config: GPT2Config
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, attention_mask=None, deterministic=True, **_):
    mixer = linen.Retention(num_heads=self.config.n_head, dtype=self.dtype)
    mask = None if attention_mask is None else attention_mask.astype(bool)
    y, _ = mixer(x, mask=mask, form="chunkwise")
    return (nn.Dropout(self.config.resid_pdrop)(y, deterministic=deterministic),)


gpt2.FlaxGPT2Attention = RetentionForGPT2


def main(steps: int = 50, batch_size: int = 8, length: int = 64):
  config = GPT2Config(vocab_size=256, n_positions=length, n_embd=64, n_layer=2, n_head=4)
  model = gpt2.FlaxGPT2LMHeadModel(config, seed=0)
  text = np.frombuffer(inspect.getsource(inspect).encode(), np.uint8).astype(np.int32)
  starts = np.random.default_rng(0).integers(0, len(text) - length, (steps, batch_size))
  batches = text[starts[..., None] + np.arange(length)]
  optimizer = optax.adamw(3e-3)

  def loss(params, ids):
    logits = model(ids, params=params).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, moments, ids):
    value, gradient = jax.value_and_grad(loss)(params, ids)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value

  params, moments, losses = model.params, optimizer.init(model.params), []
  for n, ids in enumerate(batches, start=1):
    params, moments, value = step(params, moments, ids)
    losses.append(float(value))
    if n == 1 or n % 10 == 0:
      print(f"step {n}  loss {losses[-1]:.3f}")
  return model, params, losses


if __name__ == "__main__":
  main()
