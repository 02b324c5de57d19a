"""The optimizer and its schedule."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then a cosine to `final_fraction` of it at the last step.

  The warm-up takes at most a tenth of the run, so that a shortened run is still a sensible one.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=min(config.warmup_steps, total_steps // 10),
    decay_steps=total_steps,
    end_value=config.learning_rate * config.final_fraction,
  )


def optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
  """AdamW after clipping by global norm; only matrices are decayed."""

  def matrices(params: Any) -> Any:
    return jax.tree.map_with_path(_is_matrix, params)

  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule(config, total_steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=matrices,
    ),
  )


def _is_matrix(path, leaf) -> bool:
  """By name, not by rank: in a scanned stack a vector has a layer axis too."""
  return path[-1].key in ("kernel", "embedding")
