"""Efficient sequence architectures behind one module interface.

from triform.arch import build, load, generate
"""

if __name__ != "triform.arch":
  raise ImportError(
    "this folder is the package `triform.arch`: install it with `pip install -e .` and write "
    "`import triform.arch`"
  )

from .generation import generate, stream
from .interface import FORMS, SequenceModule, put_rows, state_bytes, take_rows
from .loading import load
from .mixers.retention import Retention, RetentionState
from .models import build
from .models.language_model import LanguageModel
from .models.retnet import RetNet
from .models.stack import Block, Stack

__all__ = [
  "FORMS",
  "Block",
  "LanguageModel",
  "RetNet",
  "Retention",
  "RetentionState",
  "SequenceModule",
  "Stack",
  "build",
  "generate",
  "load",
  "put_rows",
  "state_bytes",
  "stream",
  "take_rows",
]
