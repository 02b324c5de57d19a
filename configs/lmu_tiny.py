"""Legendre-memory language model on the source of Python's standard library: 1,763,680 parameters.

    python train.py --config=configs/lmu_tiny.py

Under six minutes on two CPU cores; 1.63 bits per byte on 50,000 held-out tokens (one run, seed 0,
Python 3.11). Data and size are those of `retnet_tiny`. Windows of 16 tokens are enough for layers
that stand on one another: of order 4, 8 and 16 with windows of 8 to 128 tokens, held-out losses
after 300 steps were within 0.08 nats, and more channels were better than more coefficients.
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="lmu",
    vocab_size=2048,
    d_model=160,
    num_layers=4,
    order=4,
    theta=16.0,
    channels=80,
    ffn_dim=560,
    tie_embeddings=True,
    chunk_size=32,
    dtype="float32",
    scan_layers=False,
  )
  config.seq_len = 512
  config.batch_size = 2
  config.total_steps = 1900
  config.optimizer.learning_rate = 4e-3
  config.optimizer.final_fraction = 0.05
  config.eval.every_steps = 250
  config.eval.max_tokens = 50_000
  config.checkpoint.every_steps = 250
  return config
