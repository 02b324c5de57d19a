"""Retention and attention within a window, in the size of `retnet_1b`: 1,248,954,368 parameters.

Two layers of retention, then one of attention to the last 1,024 tokens, as Griffin mixes its own
recurrence with attention (arXiv 2402.19427): the state is of constant size. The recipe is that of
`retnet_1b`.

python train.py --config=configs/hybrid_1b.py --workdir=runs/hybrid_1b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="hybrid",
    pattern=(
      "retention(value_dim=3456, decay_schedule='linspace'), "
      "retention(value_dim=3456, decay_schedule='linspace'), "
      "attention(num_heads=16, window=1024)"
    ),
    vocab_size=32000,
    d_model=2048,
    num_layers=24,
    num_heads=8,
    ffn_dim=3456,
    dropout=0.1,
    dtype="bfloat16",
    remat="full",
  )
  config.seq_len = 2048
  config.batch_size = 32
  config.total_steps = 25000
  config.optimizer.learning_rate = 6e-4
  config.optimizer.warmup_steps = 375
  config.optimizer.clip_norm = 2.0
  return config
