"""Retention (RetNet, arXiv 2307.08621): one function, three forms, and its head normalisation."""

from .api import FORMS, Form, head_norm, retention

__all__ = ["FORMS", "Form", "head_norm", "retention"]
