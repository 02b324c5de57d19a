"""The examples do what they print."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
  return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def assert_causal(logits_of, ids):
  """Another last token changes the last logits and no others."""
  one, other = (np.asarray(logits_of(ids)) for ids in (ids, ids.at[:, -1].add(1)))
  np.testing.assert_array_equal(one[:, :-1], other[:, :-1])
  assert np.all(np.any(one[:, -1] != other[:, -1], axis=-1))


def test_nnx_transformer():
  module = example("nnx_transformer")
  whole, difference = module["main"](length=12)
  assert difference < 1e-4 * jnp.abs(whole).max()
  model = module["Transformer"](vocab_size=20, d=16, num_layers=1, rngs=nnx.Rngs(0))
  assert_causal(jax.jit(lambda ids: model(ids)[0]), jnp.arange(10).reshape(2, 5))


def test_linen_scan():
  module = example("linen_scan")
  kernel, whole, difference = module["main"](length=12, num_layers=3)
  assert kernel.shape == (3, 64, 64) and jnp.any(kernel[0] != kernel[1])
  assert difference < 1e-4 * jnp.abs(whole).max()
  model = module["Model"](vocab_size=20, d=16, num_layers=2)
  ids, empty = jnp.arange(10).reshape(2, 5), model.init_states(2)
  variables = model.init(jax.random.key(0), ids, empty)
  assert_causal(jax.jit(lambda ids: model.apply(variables, ids, empty)[0]), ids)


def test_plain_jax():
  """In a process of its own, as a user runs it: Flax must not be loaded."""
  done = subprocess.run(
    [sys.executable, EXAMPLES / "plain_jax.py"], capture_output=True, text=True, check=True
  )
  *figures, last = done.stdout.splitlines()
  assert last == "Flax is loaded: False"
  assert len(figures) == 4 and all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in figures)


@pytest.mark.slow
@jax.numpy_rank_promotion("allow")  # GPT-2's code adds a bias [d] to [b, t, d]
def test_published_model():
  model, params, losses = example("published_model")["main"](length=32)
  assert len(losses) == 50 and np.mean(losses[-5:]) < 0.8 * losses[0]
  names = set(params["transformer"]["h"]["0"]["attn"]["Retention_0"])
  assert names == {"query", "key", "value", "gate", "output"}
  logits = jax.jit(lambda ids, mask=None: model(ids, mask, params=params).logits)
  ids = jnp.arange(20).reshape(2, 10)
  assert_causal(logits, ids)
  # Padding on the left: only the positions that GPT-2 adds to the embeddings are not ours.
  mask = jnp.ones((2, 10), int).at[:, :3].set(0)
  padded = logits(ids, mask)
  np.testing.assert_array_equal(padded[:, 3:], logits(ids.at[:, :3].set(7), mask)[:, 3:])


def test_all_examples_are_tested():
  assert {path.stem for path in EXAMPLES.glob("*.py")} == {
    name.removeprefix("test_") for name in globals() if name.startswith("test_")
  } - {"all_examples_are_tested"}
