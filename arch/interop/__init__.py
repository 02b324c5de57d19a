"""Weights published elsewhere as models of this library.

`from_torchscale(config, params)` and `from_fla(config, params)` take the source's own option
names and state dict (as NumPy arrays) and return a `RetNet`, called like any other model:

    logits, state = from_fla(config, params)(ids, form="chunkwise")

Every parameter must be used exactly once, and an option that changes the function is either
computed or refused by name: an import that returns is the published function.
"""

from .fla import from_fla
from .torchscale import from_torchscale, from_torchscale_state, to_torchscale_state

__all__ = ["from_fla", "from_torchscale", "from_torchscale_state", "to_torchscale_state"]
