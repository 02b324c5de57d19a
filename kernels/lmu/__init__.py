"""Legendre memory: one function, three forms. The LMU is Voelker et al., NeurIPS 2019."""

from .api import DISCRETIZERS, METHODS, Discretizer, Method, lmu

__all__ = ["DISCRETIZERS", "METHODS", "Discretizer", "Method", "lmu"]
