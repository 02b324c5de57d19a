"""Causal softmax attention and its cache: one function, three forms."""

from .api import KVCache, attention, new_cache
from .relative import relative_buckets

__all__ = ["KVCache", "attention", "new_cache", "relative_buckets"]
