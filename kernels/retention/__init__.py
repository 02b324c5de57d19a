"""Retention (RetNet, arXiv 2307.08621): one function, three forms, and its head normalisation."""

from .api import head_norm, retention

__all__ = ["head_norm", "retention"]
