"""One training step as a pure function of the state, the batch and the step number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..layout import split_model
from .losses import cross_entropy


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
  accumulate: int = 1,
  z_loss: float = 0.0,
  loss_pieces: int = 1,
  average_decay: float | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """`step_fn(state, batch, step) -> (state, metrics)`.

  The loss is the mean over the tokens in the batch's `loss_mask`, whether the batch is computed
  at once or in `accumulate` parts one after another (rows `i, i + accumulate, ...` in part `i`,
  so that every device has rows in each). Randomness is `fold_in(key(seed), step)`, so that a step
  depends on nothing but its arguments. Metrics tell whether loss and update were `finite`.
  """

  def loss_fn(params, variables, batch, key):
    model = nnx.merge(graphdef, params, variables)
    features, _ = model.encode(
      batch["inputs"], form=form, reset=batch["reset"], mask=batch["mask"], rngs=nnx.Rngs(key)
    )
    objective, nats = cross_entropy(
      model.read_out,
      features,
      batch["targets"],
      batch["loss_mask"],
      z_loss=z_loss,
      pieces=loss_pieces,
    )
    return objective, (nats, split_model(model)[2])

  gradient_fn = jax.grad(loss_fn, has_aux=True)

  def accumulated(params, variables, batch, key):
    """Sums over the batch: gradients, and cross entropy; and the variables after it."""

    def add(carry, part):
      sums, variables = carry
      i, rows = part
      gradients, (nats, variables) = gradient_fn(
        params, variables, rows, jax.random.fold_in(key, i)
      )
      return (jax.tree.map(jnp.add, sums, (gradients, nats)), variables), None

    if accumulate == 1:
      gradients, (nats, variables) = gradient_fn(params, variables, batch, key)
      return gradients, nats, variables
    parts = jax.tree.map(
      lambda a: jnp.swapaxes(a.reshape(-1, accumulate, *a.shape[1:]), 0, 1), batch
    )
    zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32)
    (sums, variables), _ = jax.lax.scan(add, (zeros, variables), (jnp.arange(accumulate), parts))
    return *sums, variables

  def train_step(state: TrainState, batch: dict[str, jax.Array], step: jax.Array):
    key = jax.random.fold_in(jax.random.key(seed), step)
    gradients, nats, variables = accumulated(state.params, state.variables, batch, key)
    tokens = jnp.maximum(batch["loss_mask"].sum(), 1)
    gradients = jax.tree.map(lambda g: g / tokens, gradients)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    average = None
    if average_decay is not None:
      average = optax.incremental_update(params, state.average, 1 - average_decay)
    metrics = {
      "loss": nats / tokens,
      "total_loss": nats,
      "gradient_norm": optax.tree.norm(gradients),
      "finite": jnp.isfinite(nats) & jnp.isfinite(optax.tree.norm(updates)),
    }
    return TrainState(params, variables, optimizer_state, average), metrics

  return train_step
