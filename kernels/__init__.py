"""Pure functions for sequence mixing, usable from any JAX code: no Flax, no state of their own.

Axis letters: `b` batch, `t` time, `s` tokens that are attended to, `h` heads, `g` key/value heads,
`k` key size, `v` value size, `d` features, `c` chunk; `n` number of chunks, and the order of a
Legendre memory.
"""

from .attention import KVCache, attention, new_cache, relative_buckets
from .checks import FORMS, Form
from .convolution import causal_depthwise_conv, causal_shifts
from .hypermixing import activate, causal_hypermixing
from .implementations import IMPLEMENTATIONS, Implementation
from .lif import SURROGATES, lif
from .lmu import lmu
from .positions import decayed_count, token_positions
from .retention import RetentionReplay, head_norm, new_replay, retention, retention_step
from .rotary import rotary_phase, rotary_steps, rotate
from .sinusoid import sinusoid

__all__ = [
  "FORMS",
  "IMPLEMENTATIONS",
  "SURROGATES",
  "Form",
  "Implementation",
  "KVCache",
  "RetentionReplay",
  "activate",
  "attention",
  "causal_depthwise_conv",
  "causal_hypermixing",
  "causal_shifts",
  "decayed_count",
  "head_norm",
  "lif",
  "lmu",
  "new_cache",
  "new_replay",
  "relative_buckets",
  "retention",
  "retention_step",
  "rotary_phase",
  "rotary_steps",
  "rotate",
  "sinusoid",
  "token_positions",
]
