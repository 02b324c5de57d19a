"""One training step as a pure function of the state, the batch and the step number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..layout import split_model
from .losses import Sums, next_token_loss


class TrainState(NamedTuple):
  """All that a run changes; pure dictionaries of arrays."""

  params: Any
  variables: Any  # what is not trained: statistics that calls update
  optimizer: Any
  average: Any = None  # of the parameters, exponential moving; None if there is none


def token_losses(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:  # [b, t]
  """Cross entropy of every target in nats, 0 where it is not trained on (`loss_mask`)."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  return jnp.where(batch["loss_mask"], losses, 0)


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  *,
  form: str,
  seed: int,
  loss: Callable[..., Sums] = next_token_loss,
  accumulate: int = 1,
  average_decay: float | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """`step_fn(state, batch, step) -> (state, metrics)`.

  `loss` is one of `losses`. It is the mean over what counts in the batch's `loss_mask`, whether the
  batch is computed at once or in `accumulate` parts one after another (rows `i, i + accumulate`
  and so on in part `i`, so that every device has rows in each). Randomness is
  `fold_in(key(seed), step)`: a step depends on nothing but its arguments. Metrics are the means of
  what the loss reports, `total_loss`, `gradient_norm`, and whether loss and update were `finite`.
  """

  def loss_fn(params, variables, batch, key):
    model = nnx.merge(graphdef, params, variables)
    objective, sums = loss(model, batch, form=form, rngs=nnx.Rngs(key))
    return objective, (sums, split_model(model)[2])

  gradient_fn = jax.grad(loss_fn, has_aux=True)

  def accumulated(params, variables, batch, key):
    """Sums over the batch: gradients, and what is reported; and the variables after it."""

    def add(carry, part):
      total, variables = carry
      i, rows = part
      gradients, (sums, variables) = gradient_fn(
        params, variables, rows, jax.random.fold_in(key, i)
      )
      return (jax.tree.map(jnp.add, total, (gradients, sums)), variables), None

    if accumulate == 1:
      gradients, (sums, variables) = gradient_fn(params, variables, batch, key)
      return gradients, sums, variables
    parts = jax.tree.map(
      lambda a: jnp.swapaxes(a.reshape(-1, accumulate, *a.shape[1:]), 0, 1), batch
    )
    first = jax.tree.map(lambda a: a[0], parts)
    gradients, (sums, _) = jax.eval_shape(gradient_fn, params, variables, first, key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (gradients, sums))
    (total, variables), _ = jax.lax.scan(add, (zeros, variables), (jnp.arange(accumulate), parts))
    return *total, variables

  def train_step(state: TrainState, batch: dict[str, jax.Array], step: jax.Array):
    key = jax.random.fold_in(jax.random.key(seed), step)
    gradients, sums, variables = accumulated(state.params, state.variables, batch, key)
    count = jnp.maximum(batch["loss_mask"].sum(), 1)
    gradients = jax.tree.map(lambda g: g / count, gradients)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    average = None
    if average_decay is not None:
      decay = jnp.minimum(average_decay, (1 + step) / (10 + step))  # the start is soon forgotten
      average = optax.incremental_update(params, state.average, 1 - decay)
    metrics = {
      **{name: value / count for name, value in sums.items()},
      "total_loss": sums["loss"],
      "gradient_norm": optax.tree.norm(gradients),
      "finite": jnp.isfinite(sums["loss"]) & jnp.isfinite(optax.tree.norm(updates)),
    }
    return TrainState(params, variables, optimizer_state, average), metrics

  return train_step
