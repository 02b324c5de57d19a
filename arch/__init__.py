"""Efficient sequence architectures behind one module interface.

    from triform.arch import build, load, generate
"""

if __name__ != "triform.arch":
  raise ImportError(
    "this folder is the package `triform.arch`: install it with `pip install -e .` and write "
    "`import triform.arch`"
  )

from .interface import SequenceModule, put_rows, take_rows  # noqa: E402  (the guard comes first)
from .mixers.retention import Retention, RetentionState  # noqa: E402
from .models.retnet import RetNet  # noqa: E402

__all__ = ["RetNet", "Retention", "RetentionState", "SequenceModule", "put_rows", "take_rows"]
