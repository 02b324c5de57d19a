"""The one folder for what can be made again: prepared data and compiled programs."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
  """The environment's `TRIFORM_DATA`, else `triform` in `XDG_CACHE_HOME` or in `~/.cache`."""
  if folder := os.environ.get("TRIFORM_DATA"):
    return Path(folder).expanduser()
  return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "triform"


def enable_compilation_cache() -> None:
  """Keeps compiled programs in `xla` of `cache_folder`, unless JAX was told another place."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
