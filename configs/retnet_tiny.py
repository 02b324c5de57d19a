"""RetNet on the source of Python's standard library, for a laptop: 1,762,720 parameters.

    python train.py --config=configs/retnet_tiny.py

Under eight minutes on two CPU cores; 1.69 bits per byte on the whole of the held-out files, where
gzip -9 takes 2.01 and xz -9 takes 1.69 (one run, seed 0, Python 3.11).
Variants, `configs/retnet_tiny.py:VARIANT`: `fla`, `gated`, `learned`.
"""

from triform.arch.training.config import default_config

VARIANTS = {
  "torchscale": {},
  "fla": {"dialect": "fla"},  # flash-linear-attention's RetNet
  "gated": {"decay": "gated"},  # YOCO's gated retention
  "learned": {"decay": "learned"},
}


def get_config(variant: str = "torchscale"):
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
  config = default_config(
    architecture="retnet",
    vocab_size=2048,
    d_model=160,
    num_layers=4,
    num_heads=4,
    value_dim=320,
    ffn_dim=320,
    tie_embeddings=True,
    decay="fixed",
    decay_schedule="linspace",
    dialect="torchscale",
    dropout=0.0,
    chunk_size=64,
    dtype="float32",
    scan_layers=False,
  )
  config.model.update(VARIANTS[variant])
  config.seq_len = 512
  config.batch_size = 2
  config.total_steps = 1700
  config.optimizer.learning_rate = 4e-3
  config.optimizer.final_fraction = 0.05
  config.eval.every_steps = 340
  config.eval.max_tokens = 50_000
  config.checkpoint.every_steps = 340
  return config
