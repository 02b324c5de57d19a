"""Token mixers by name, for models whose layers have different ones."""

from .attention import Attention, MultiDConvHeadAttention
from .hypermixing import CausalHyperMixing, HyperMixing
from .lmu import LMU
from .retention import Retention


def _lmu(d_model: int, *, num_heads: int, **options) -> LMU:
  """A Legendre Memory Unit with a memory channel for every head."""
  return LMU(d_model, channels=num_heads, hidden_size=d_model, **options)


MIXERS = {
  "attention": Attention,
  "bidirectional_hypermixing": HyperMixing,
  "hypermixing": CausalHyperMixing,
  "lmu": _lmu,
  "mdha": MultiDConvHeadAttention,
  "retention": Retention,
}
