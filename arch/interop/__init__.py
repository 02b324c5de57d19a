"""Weights published elsewhere as models of this library, and back.

`load_fla(path)` reads a Hugging Face model of flash-linear-attention; `from_torchscale(config,
params)` and `from_fla(config, params)` take the source's own option names and state dict (as
NumPy arrays) and return a `RetNet`; `from_primer(config, params)` takes mesh-TensorFlow's variables
and returns a `Primer`; `from_idiap` and `from_speechbrain` return a HyperMixing layer,
`from_keras_lmu` an LMU, and `from_lmuformer` an LMUFormer or its cell. They are called like any
other model:

    logits, state = load_fla("retnet-1.3B-100B")(ids, form="chunkwise")

Every parameter must be used exactly once, and an option that changes the function is either
computed or refused by name: an import that returns is the published function. `to_...` and
`save_fla` are the inverses, and `state_to_...` and `state_from_...` convert what is carried along a
sequence, so that one library goes on where the other stopped.
"""

from .fla import from_fla, state_from_fla, state_to_fla, to_fla
from .huggingface import load_fla, save_fla
from .hypermixing import from_idiap, from_speechbrain, to_idiap, to_speechbrain
from .lmu import from_keras_lmu, to_keras_lmu
from .lmuformer import from_lmuformer, to_lmuformer
from .primer import from_primer, to_primer
from .torchscale import (
  from_torchscale,
  state_from_torchscale,
  state_to_torchscale,
  to_torchscale,
)

__all__ = [
  "from_fla",
  "from_idiap",
  "from_keras_lmu",
  "from_lmuformer",
  "from_primer",
  "from_speechbrain",
  "from_torchscale",
  "load_fla",
  "save_fla",
  "state_from_fla",
  "state_from_torchscale",
  "state_to_fla",
  "state_to_torchscale",
  "to_fla",
  "to_idiap",
  "to_keras_lmu",
  "to_lmuformer",
  "to_primer",
  "to_speechbrain",
  "to_torchscale",
]
