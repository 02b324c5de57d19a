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
from .mixers.attention import Attention, MultiDConvHeadAttention
from .mixers.hypermixing import CausalHyperMixing, HyperMixing, HyperMixingState
from .mixers.lmu import LMU, LMUState
from .mixers.retention import Retention, RetentionState
from .models import build
from .models.classifier import Classifier
from .models.encoder import Encoder
from .models.hybrid import Hybrid
from .models.hypermixer import HyperMixer, HyperMixerClassifier
from .models.language_model import LanguageModel
from .models.lmu import LMUClassifier, LMULanguageModel
from .models.lmuformer import LMUFormer
from .models.primer import Primer
from .models.retnet import RetNet
from .models.stack import Block, PatternStack, Stack
from .models.transformer import Transformer, TransformerPlusPlus

__all__ = [
  "FORMS",
  "LMU",
  "Attention",
  "Block",
  "CausalHyperMixing",
  "Classifier",
  "Encoder",
  "Hybrid",
  "HyperMixer",
  "HyperMixerClassifier",
  "HyperMixing",
  "HyperMixingState",
  "LMUClassifier",
  "LMUFormer",
  "LMULanguageModel",
  "LMUState",
  "LanguageModel",
  "MultiDConvHeadAttention",
  "PatternStack",
  "Primer",
  "RetNet",
  "Retention",
  "RetentionState",
  "SequenceModule",
  "Stack",
  "Transformer",
  "TransformerPlusPlus",
  "build",
  "generate",
  "load",
  "put_rows",
  "state_bytes",
  "stream",
  "take_rows",
]
