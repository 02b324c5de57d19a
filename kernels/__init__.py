"""Pure functions for sequence mixing, usable from any JAX code: no Flax, no state of their own.

Axis letters, everywhere: `b` batch, `t` time, `h` heads, `g` key/value heads, `k` key size,
`v` value size, `c` chunk, `n` number of chunks.
"""

from .positions import token_positions
from .retention import head_norm, retention
from .rotary import rotary_phase, rotary_steps, rotate

__all__ = [
  "head_norm",
  "retention",
  "rotary_phase",
  "rotary_steps",
  "rotate",
  "token_positions",
]
