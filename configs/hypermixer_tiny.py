"""Causal HyperMixer on the source of Python's standard library, for a laptop: 1,760,160 parameters.

    python train.py --config=configs/hypermixer_tiny.py

About eight minutes on two CPU cores; 1.82 bits per byte on 50,000 held-out tokens (one run, seed 0,
Python 3.11). Data and size are those of `retnet_tiny`, the steps fewer, each of which takes three
times as long. The causal form is ours: see `CausalHyperMixing`.
Variants, `configs/hypermixer_tiny.py:VARIANT`: `row_rms`, `variance` (the other normalisers).
"""

from triform.arch.training.config import default_config

VARIANTS = {
  "head_rms": {},
  "row_rms": {"normalizer": "row_rms"},
  "variance": {"normalizer": "variance"},
}


def get_config(variant: str = "head_rms"):
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
  config = default_config(
    architecture="hypermixer",
    vocab_size=2048,
    d_model=160,
    num_layers=4,
    num_heads=8,
    mixing_dim=160,
    ffn_dim=1072,
    decay="fixed",
    normalizer="head_rms",
    tie_embeddings=True,
    chunk_size=16,
    dtype="float32",
    scan_layers=False,
  )
  config.model.update(VARIANTS[variant])
  config.seq_len = 512
  config.batch_size = 2
  config.total_steps = 1000
  config.optimizer.learning_rate = 4e-3
  config.optimizer.final_fraction = 0.05
  config.eval.every_steps = 250
  config.eval.max_tokens = 50_000
  config.checkpoint.every_steps = 250
  return config
