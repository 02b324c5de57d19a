"""Which texts a configuration names.

A source is written `python_stdlib`, `path:FILE_OR_FOLDER`, `tfds:NAME` or `tfds:NAME@SPLIT`, and a
mixture `SOURCE=WEIGHT,SOURCE=WEIGHT`, such as `tfds:pg19=0.7,path:~/notes=0.3`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import Source
from .text_files import PathSource
from .tfds_sets import TfdsSource, prepared_builder, stdlib_builder

_CHOICES = ("path", "tfds", "mixture")


@dataclass(frozen=True)
class Part:
  """One source of a training mixture."""

  source: Source
  weight: float
  validation: Source | None  # documents of its own to evaluate on; None: some are held out


def configured_parts(config: Mapping[str, Any], folder: Path) -> list[Part]:
  """The sources of a `data` configuration, see `load_text`; TFDS sets are prepared in `folder`."""
  given = [name for name in _CHOICES if config[name]]
  if len(given) > 1:
    raise ValueError(f"config.data has {' and '.join(given)}: expected one of {_CHOICES}")
  kind = given[0] if given else None
  if kind is None:
    weights = {config["name"]: 1.0}
  elif kind == "mixture":
    weights = parse_mixture(config["mixture"])
  else:
    weights = {f"{kind}:{config[kind]}": 1.0}
  if config["split"] and not any(spec.startswith("tfds:") for spec in weights):
    raise ValueError(f"config.data.split is {config['split']!r}, but there is no TFDS set")

  validation = None
  if config["validation"]:
    spec = _validation_spec(config, kind)
    validation = _source(spec, config, folder)[0]
  parts = []
  for spec, weight in weights.items():
    source, own = _source(spec, config, folder)
    parts.append(Part(source, weight, validation or own))
  return parts


def parse_mixture(mixture: str) -> dict[str, float]:
  """`SOURCE=WEIGHT,SOURCE=WEIGHT` as weights by source; a source without a weight has 1."""
  weights = {}
  for part in filter(None, map(str.strip, mixture.split(","))):
    spec, equals, number = part.rpartition("=")
    if not equals:
      spec, number = part, "1"
    try:
      weight = float(number)
    except ValueError:
      weight = math.nan
    if not 0 < weight < math.inf:
      raise ValueError(f"the weight of {spec!r} in config.data.mixture is {number!r}: expected > 0")
    if spec in weights:
      raise ValueError(f"config.data.mixture names {spec!r} twice")
    weights[spec] = weight
  if not weights:
    raise ValueError(f"config.data.mixture is {mixture!r}, expected SOURCE=WEIGHT,SOURCE=WEIGHT")
  return weights


def _validation_spec(config: Mapping[str, Any], kind: str | None) -> str:
  """A source, or for short a path where the corpus is a path, and a split where it is of TFDS."""
  validation = config["validation"]
  if validation == "python_stdlib" or validation.startswith(("path:", "tfds:")):
    return validation
  if kind == "path":
    return f"path:{validation}"
  if kind == "tfds":
    return f"tfds:{config['tfds'].partition('@')[0]}@{validation}"
  raise ValueError(
    f"config.data.validation is {validation!r}, expected path:FILE_OR_FOLDER or tfds:NAME@SPLIT"
  )


def _source(spec: str, config: Mapping[str, Any], folder: Path) -> tuple[Source, Source | None]:
  """A source, and the documents to evaluate on that come with it."""
  kind, _, name = spec.partition(":")
  fields = config["text_field"], config["prompt_field"]
  if spec == "python_stdlib":
    builder = stdlib_builder(folder / "tfds")
    return tuple(TfdsSource(spec, builder, split, "text") for split in ("train", "validation"))
  if kind == "path" and name:
    return PathSource(name, *fields, cache=folder / "contents"), None
  if kind == "tfds" and name:
    name, _, split = name.partition("@")
    split = split or config["split"] or "train"
    builder = prepared_builder(name, folder / "tfds")
    source = TfdsSource(name, builder, split, *fields)
    if "validation" in builder.info.splits and not re.search(r"\b(all|validation)\b", split):
      return source, TfdsSource(name, builder, "validation", *fields)
    return source, None
  raise ValueError(
    f"expected a corpus among python_stdlib, path:FILE_OR_FOLDER, tfds:NAME, got {spec!r}"
  )
