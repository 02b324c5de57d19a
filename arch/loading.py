"""A trained model back from its work directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from .interface import SequenceModule
from .layout import from_stacked, split_model, to_stacked
from .models import build

if TYPE_CHECKING:
  from .data.tokenizers import Tokenizer


def load(
  workdir: str | os.PathLike, *, step: int | None = None, config: Mapping[str, Any] | None = None
) -> tuple[SequenceModule, "Tokenizer"]:
  """Returns the model and the tokenizer of a run, `model, tokenizer = load(workdir)`.

  Reads the newest checkpoint (or that of `step`), without the optimizer. Layers are unrolled,
  which is how decoding is fast. `config` replaces the run's own, to change what does not shape
  the parameters (such as `config.model.dtype`).
  Raises `ValueError` if `workdir` is not a run's, has no checkpoint, or does not fit `config`.
  """
  # Imported here so that `import triform.arch` stays free of orbax and sentencepiece.
  from .data.tokenizers import load_tokenizer
  from .training.checkpoints import restore
  from .training.workdir import load_config

  workdir = Path(workdir)
  config = load_config(workdir) if config is None else config
  options = {**config["model"], "scan_layers": False}
  abstract = nnx.eval_shape(lambda: build(options, rngs=nnx.Rngs(0)))
  graphdef, params, variables = split_model(abstract)
  like = {"params": params, "variables": variables}
  _, leaves = restore(workdir / "checkpoints", jax.eval_shape(to_stacked, like), step)
  model = nnx.merge(graphdef, *from_stacked(leaves, like).values())
  return model, load_tokenizer(workdir / "tokenizer")
