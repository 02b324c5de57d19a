"""Token mixers by name, for models whose layers have different ones."""

from .attention import Attention, MultiDConvHeadAttention
from .hypermixing import CausalHyperMixing
from .retention import Retention

MIXERS = {
  "attention": Attention,
  "hypermixing": CausalHyperMixing,
  "mdha": MultiDConvHeadAttention,
  "retention": Retention,
}
