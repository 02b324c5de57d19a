"""Causal HyperMixing: one function, three forms. HyperMixing is arXiv 2203.03691."""

from .api import ACTIVATIONS, Activation, causal_hypermixing
from .xla import activate

__all__ = ["ACTIVATIONS", "Activation", "activate", "causal_hypermixing"]
