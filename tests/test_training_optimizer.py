"""Optimizers by name, schedules, and multipliers by parameter name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from triform.arch.training.config import default_config
from triform.arch.training.optimizer import optimizer, schedule

PARAMS = {
  "embedding": {"embedding": jnp.ones((4, 2))},
  "stack": {"layers": {0: {"kernel": jnp.full((2, 3), 2.0), "scale": jnp.ones(3)}}},
}


def config(**changes):
  config = default_config(architecture="retnet").optimizer
  config.update({"learning_rate": 0.1, "warmup_steps": 0, "schedule": "linear", **changes})
  return config


def step(config, gradients=None, total_steps=100):
  """The parameters after one step."""
  update = optimizer(config, total_steps)
  gradients = gradients or jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = update.update(gradients, update.init(PARAMS), PARAMS)
  return optax.apply_updates(PARAMS, updates)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_matrices_decay_and_vectors_do_not(name):
  after = step(config(name=name, weight_decay=0.5))
  np.testing.assert_allclose(after["stack"]["layers"][0]["kernel"], 2.0 * (1 - 0.1 * 0.5))
  np.testing.assert_allclose(after["embedding"]["embedding"], 1 - 0.1 * 0.5)
  np.testing.assert_array_equal(after["stack"]["layers"][0]["scale"], 1)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_every_optimizer_goes_downhill(name):
  update = optimizer(config(name=name, learning_rate=0.05), 200)
  loss = jax.jit(
    jax.value_and_grad(lambda p: sum(((a - 0.3) ** 2).sum() for a in jax.tree.leaves(p)))
  )
  params, state = PARAMS, update.init(PARAMS)
  first, _ = loss(params)
  for _ in range(200):
    _, gradients = loss(params)
    updates, state = update.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  assert loss(params)[0] < 0.02 * first


def test_multipliers_are_found_by_name_without_layer_numbers():
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  rules = ((r"^stack/layers/kernel$", 0.5), (r"^embedding/", 0.0), (r"", 1.0))
  changed = step(config(weight_decay=0.0, learning_rate_multipliers=rules), ones)
  plain = step(config(weight_decay=0.0), ones)
  moved, whole = (jax.tree.map(jnp.subtract, PARAMS, after) for after in (changed, plain))
  kernel = [tree["stack"]["layers"][0]["kernel"] for tree in (moved, whole)]
  np.testing.assert_allclose(kernel[0], 0.5 * kernel[1], rtol=1e-6)
  np.testing.assert_array_equal(moved["embedding"]["embedding"], 0)


def test_a_parameter_without_a_multiplier_is_named():
  rules = ((r"kernel$", 1.0), (r"scale$", 1.0))
  with pytest.raises(ValueError, match=r"no pattern .* matches parameter embedding/embedding"):
    step(config(learning_rate_multipliers=rules))


@pytest.mark.parametrize("changes", [{"name": "adamx"}, {"schedule": "cosin"}])
def test_unknown_names_are_refused(changes):
  with pytest.raises(ValueError, match=f"'{next(iter(changes.values()))}', expected one of"):
    step(config(**changes))


def test_schedules_rise_and_fall():
  total, warmup = 1000, 50
  for name, middle, end in (
    ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("rsqrt", (50 / 525) ** 0.5, (50 / 1000) ** 0.5)
  ):  # fmt: skip
    rate = schedule(config(schedule=name, learning_rate=1.0, warmup_steps=warmup), total)
    assert rate(0) == 0 and rate(warmup) == 1
    np.testing.assert_allclose(rate(warmup // 2), 0.5)
    np.testing.assert_allclose(rate((total + warmup) // 2), middle, rtol=1e-5)
    np.testing.assert_allclose(rate(total), end, rtol=1e-5)


def test_warm_up_of_a_short_run_is_a_tenth_of_it():
  rate = schedule(config(learning_rate=1.0, warmup_steps=100), 20)
  assert rate(2) == 1
