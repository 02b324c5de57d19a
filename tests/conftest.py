"""Settings every test runs under: CPU, no silent rank promotion, reproducible examples."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import HealthCheck, Phase, settings

jax.config.update("jax_numpy_rank_promotion", "raise")

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile(
  "quick",
  max_examples=5,
  derandomize=True,
  database=None,
  phases=[Phase.explicit, Phase.generate],  # shrinking is for `thorough`
  **COMMON,
)
settings.register_profile("thorough", max_examples=100, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


