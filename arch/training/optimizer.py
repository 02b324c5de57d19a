"""Optimizers by name, their schedule, and multipliers by the name of a parameter."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ..layout import stacked_names


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then what `config.schedule` names.

  `cosine`, `linear` and `exponential` fall to `final_fraction` of it at the last step; `rsqrt`
  falls with the inverse square root of the step and needs no last step. The warm-up takes at most
  a tenth of the run, so that a shortened run is still a sensible one.
  """
  peak, warmup = config.learning_rate, min(config.warmup_steps, total_steps // 10)
  rise = max(warmup, 1)
  final, decay_steps = peak * config.final_fraction, max(total_steps - warmup, 1)
  after = {
    "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
    "linear": optax.linear_schedule(peak, final, decay_steps),
    "exponential": lambda step: peak * config.final_fraction ** (step / decay_steps),
    "rsqrt": lambda step: peak * jnp.sqrt(rise / (jnp.maximum(step, 0) + rise)),
  }
  if config.schedule not in after:
    raise ValueError(
      f"optimizer.schedule is {config.schedule!r}, expected one of {', '.join(after)}"
    )
  before = optax.linear_schedule(0.0, peak, rise)
  return optax.join_schedules([before, after[config.schedule]], [warmup])


def optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
  """The optimizer `config.name` after clipping by global norm.

      p -= schedule(step) * learning_rate_multiplier(p) * (
        direction(gradient) + weight_decay * weight_decay_multiplier(p) * p)

  Directions are optax's: `adamw` (`b1`, `b2`, `eps`), `lion` (`b1`, `b2`), and `adafactor`
  (factored second moments, updates clipped to root mean square 1, scaled by the parameter's). A
  multiplier is the first of `config.*_multipliers` whose regular expression is found in the
  parameter's name (as in `parameters.txt`, without layer numbers).

  Raises:
    ValueError: for an unknown name or schedule, and when a parameter has no multiplier.
  """
  directions = {
    "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
    "lion": lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
    "adafactor": lambda: optax.chain(
      optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    ),
  }
  if config.name not in directions:
    raise ValueError(f"optimizer.name is {config.name!r}, expected one of {', '.join(directions)}")
  decays = functools.partial(_multipliers, config, "weight_decay_multipliers")
  rates = functools.partial(_multipliers, config, "learning_rate_multipliers")
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    directions[config.name](),
    optax.stateless(
      lambda updates, params: jax.tree.map(
        lambda u, p, decay: u + config.weight_decay * decay * p if decay else u,
        updates,
        params,
        decays(params),
      )
    ),
    optax.scale_by_learning_rate(schedule(config, total_steps)),
    optax.stateless(
      lambda updates, params: jax.tree.map(lambda u, rate: u * rate, updates, rates(params))
    ),
  )


def _multipliers(config: ConfigDict, field: str, params: Any) -> Any:
  """The factor of every parameter."""

  def find(name):
    for pattern, factor in config[field]:
      if re.search(pattern, name):
        return factor
    raise ValueError(f"no pattern of optimizer.{field} matches parameter {name}")

  return jax.tree.map(find, stacked_names(params))
