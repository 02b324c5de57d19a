"""What a model costs: operations in closed form, checked against the traced program, and bytes.

    python -m triform.arch.flops --config=configs/retnet_tiny.py

`count` is the closed form of any module, `walk` counts a program as it is traced, `report` is the
table of a configuration. `attention`, `hypermixing`, `lmu`, `lmuformer` and `retention` register
the closed forms of our mixers by being imported.
"""

from collections.abc import Mapping
from typing import Any

from ..interface import Form
from . import attention, hypermixing, lmu, lmuformer, retention
from .closed import count
from .memory import activation_bytes, parameter_bytes
from .peaks import KNOWN_PEAKS, peak_flops
from .report import abstract_model, report
from .walk import walk
from .work import Call, Count, Work

__all__ = [
  "KNOWN_PEAKS",
  "Call",
  "Count",
  "Work",
  "abstract_model",
  "activation_bytes",
  "attention",
  "count",
  "hypermixing",
  "lmu",
  "lmuformer",
  "parameter_bytes",
  "peak_flops",
  "report",
  "retention",
  "train_flops_per_token",
  "walk",
]


def train_flops_per_token(config: Mapping[str, Any], length: int, form: Form) -> float:
  """Operations of a training step per token in products, forward and backward.

  Causal products count by what causality leaves, and recomputation is no work of the model. This is
  what utilisation of the hardware (MFU) is measured by. A classifier's tokens are the steps of its
  sequence, of which there are `length`.
  """
  call = Call(length, form, training=True, causal=True)
  counted = count(abstract_model(config), call)
  return (counted.forward + counted.backward).flops / length
