"""A RetNet mixer in an NNX transformer, in place of `nnx.MultiHeadAttention`.

The transformer is anybody's: only `Block` knows what mixes the tokens. With attention its two lines
are

    self.mixer = nnx.MultiHeadAttention(num_heads=4, in_features=d, decode=False, rngs=rngs)
    y = self.mixer(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))

and decoding reads a cache that grows with the text. Retention is causal by itself, and hands on a
state of constant size.

    python examples/nnx_transformer.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

from triform.arch import Retention


class Block(nnx.Module):
  def __init__(self, d: int, rngs: nnx.Rngs):
    self.norm_1, self.norm_2 = nnx.LayerNorm(d, rngs=rngs), nnx.LayerNorm(d, rngs=rngs)
    self.mixer = Retention(d, num_heads=4, rngs=rngs)
    self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

  def __call__(self, x, state=None, form="parallel"):
    y, state = self.mixer(self.norm_1(x), state, form=form)
    x = x + y
    return x + self.down(nnx.gelu(self.up(self.norm_2(x)))), state


class Transformer(nnx.Module):
  def __init__(self, vocab_size: int, d: int, num_layers: int, rngs: nnx.Rngs):
    self.embed = nnx.Embed(vocab_size, d, rngs=rngs)
    self.blocks = nnx.List(Block(d, rngs) for _ in range(num_layers))

  def __call__(self, ids, states=None, form="parallel"):
    x, after = self.embed(ids), []
    for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
      x, state = block(x, state, form)
      after.append(state)
    return self.embed.attend(x), after


def main(length: int = 48):
  model = Transformer(vocab_size=100, d=64, num_layers=2, rngs=nnx.Rngs(0))
  ids = jax.random.randint(jax.random.key(0), (2, length), 0, 100)
  call = jax.jit(lambda model, *args, form: model(*args, form), static_argnames="form")
  whole, _ = call(model, ids, None, form="parallel")
  one_by_one, states = [], None
  for t in range(length):
    logits, states = call(model, ids[:, t : t + 1], states, form="recurrent")
    one_by_one.append(logits)
  difference = jnp.abs(jnp.concatenate(one_by_one, axis=1) - whole).max()
  size = sum(a.nbytes for a in jax.tree.leaves(states))
  print(f"{length} tokens at once or one by one: logits differ by at most {difference:.1e}")
  print(f"the state after them, and after a million: {size:,} bytes for 2 rows and 2 layers")
  return whole, difference


if __name__ == "__main__":
  main()
