"""Primer-EZ on the source of Python's standard library, for a laptop: 1,763,616 parameters.

    python train.py --config=configs/primer_tiny.py

Under seven minutes on two CPU cores; 1.56 bits per byte on 50,000 held-out tokens (one run, seed 0,
Python 3.11).
Squared ReLU and multi-DConv-head attention, what the paper found to help most reliably. Data and
size are those of `retnet_tiny`, the steps fewer, each of which takes longer. Evaluation begins
afresh every `max_len` tokens of a document, for that is what the cache holds.
Variants, `configs/primer_tiny.py:VARIANT`: `full` (shared QK, norms before and after), `rotary`.
"""

from triform.arch.training.config import default_config

VARIANTS = {
  "ez": {},
  "full": {"shared_qk": True, "norm_placement": "pre_post"},  # as the paper prints it
  "rotary": {"position": "rotary"},
}


def get_config(variant: str = "ez"):
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
  config = default_config(
    architecture="primer",
    vocab_size=2048,
    d_model=160,
    num_layers=4,
    num_heads=4,
    ffn_dim=792,
    shared_qk=False,
    norm_placement="pre",
    position="relative",
    max_len=512,
    chunk_size=128,
    dtype="float32",
    scan_layers=False,
  )
  config.model.update(VARIANTS[variant])
  config.seq_len = 512
  config.batch_size = 2
  config.total_steps = 1150
  config.optimizer.learning_rate = 4e-3
  config.optimizer.final_fraction = 0.05
  config.eval.every_steps = 230
  config.eval.max_tokens = 50_000
  config.checkpoint.every_steps = 230
  return config
