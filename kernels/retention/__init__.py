"""Retention (RetNet, arXiv 2307.08621): one function, three forms, and its head normalisation."""

from .api import head_norm, retention
from .replay import RetentionReplay, new_replay, retention_step

__all__ = ["RetentionReplay", "head_norm", "new_replay", "retention", "retention_step"]
