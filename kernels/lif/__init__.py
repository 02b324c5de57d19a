"""Leaky integrate-and-fire neurons, and the surrogates that their spikes are differentiated by."""

from .api import SURROGATES, lif

__all__ = ["SURROGATES", "lif"]
