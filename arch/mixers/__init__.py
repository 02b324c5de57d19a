"""Token mixers by name, for models whose layers have different ones."""

from .attention import Attention, MultiDConvHeadAttention
from .retention import Retention

MIXERS = {"attention": Attention, "mdha": MultiDConvHeadAttention, "retention": Retention}
