"""One training step as a pure function of the state, the batch and the step number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..layout import split_model


class TrainState(NamedTuple):
  """All that a run changes; pure dictionaries of arrays."""

  params: Any
  variables: Any  # what is not trained: buffers, and statistics that calls update
  optimizer: Any


def token_losses(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:  # [b, t]
  """Cross entropy of every target in nats, 0 where it is not trained on (`loss_mask`)."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  return jnp.where(batch["loss_mask"], losses, 0)


def make_train_step(
  graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, *, form: str, seed: int
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """`step_fn(state, batch, step) -> (state, metrics)`.

  Randomness is `fold_in(key(seed), step)`, so that a step depends on nothing but its arguments.
  A step whose loss or update is not finite leaves the state as it was; its metrics tell.
  """

  def loss_fn(params, variables, batch, key):
    model = nnx.merge(graphdef, params, variables)
    logits, _ = model(
      batch["inputs"], form=form, reset=batch["reset"], mask=batch["mask"], rngs=nnx.Rngs(key)
    )
    total = token_losses(logits, batch).sum()
    _, _, variables = split_model(model)
    return total / jnp.maximum(batch["loss_mask"].sum(), 1), (total, variables)

  def train_step(state: TrainState, batch: dict[str, jax.Array], step: jax.Array):
    key = jax.random.fold_in(jax.random.key(seed), step)
    (loss, (total, variables)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, state.variables, batch, key
    )
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    new = TrainState(optax.apply_updates(state.params, updates), variables, optimizer_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics = {
      "loss": loss,
      "total_loss": total,
      "gradient_norm": optax.tree.norm(gradients),
      "finite": finite,
    }
    return state, metrics

  return train_step
