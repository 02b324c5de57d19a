"""A RetNet mixer in a Linen model whose layers are one layer under `nn.scan`.

Parameters and states have a leading layer axis; whatever the depth, one layer is compiled. The
states go in and come out beside the activations, so a text can be read in pieces.

    python examples/linen_scan.py
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.arch import linen


class Layer(nn.Module):
  form: str

  @nn.compact
  def __call__(self, x, state):
    y, state = linen.Retention(num_heads=4)(nn.LayerNorm()(x), state, form=self.form)
    x = x + y
    y = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))
    return x + y, state


class Model(nn.Module):
  vocab_size: int
  d: int
  num_layers: int

  @nn.compact
  def __call__(self, ids, states, form="parallel"):
    embed = nn.Embed(self.vocab_size, self.d)
    layers = nn.scan(
      nn.remat(Layer, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.num_layers,
    )
    x, states = layers(form, name="layers")(embed(ids), states)
    return embed.attend(nn.LayerNorm()(x)), states

  @nn.nowrap
  def init_states(self, batch_size):
    state = linen.Retention(self.d, num_heads=4).init_state(batch_size)
    return jax.tree.map(lambda a: jnp.zeros((self.num_layers, *a.shape), a.dtype), state)


def main(length: int = 48, num_layers: int = 6):
  model = Model(vocab_size=100, d=64, num_layers=num_layers)
  ids = jax.random.randint(jax.random.key(0), (2, length), 0, 100)
  empty = model.init_states(2)
  variables = jax.jit(model.init)(jax.random.key(1), ids, empty)
  kernel = variables["params"]["layers"]["Retention_0"]["query"]["kernel"]
  print(f"queries of all layers are one array: {kernel.shape}")

  apply = jax.jit(model.apply, static_argnames="form")
  whole, _ = apply(variables, ids, empty)
  half = length // 2
  first, states = apply(variables, ids[:, :half], empty, form="chunkwise")
  pieces = [first]
  for t in range(half, length):
    logits, states = apply(variables, ids[:, t : t + 1], states, form="recurrent")
    pieces.append(logits)
  difference = jnp.abs(jnp.concatenate(pieces, axis=1) - whole).max()
  print(f"half in chunks, the rest one by one: logits differ by at most {difference:.1e}")
  return kernel, whole, difference


if __name__ == "__main__":
  main()
