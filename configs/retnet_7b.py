"""RetNet, the 6.7B of the paper with the published code's widths: 6,771,970,048 parameters.

python train.py --config=configs/retnet_7b.py --workdir=runs/retnet_7b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=16,
    value_dim=6912,
    ffn_dim=6912,
    decay_schedule="linspace",
    dropout=0.1,
    dtype="bfloat16",
  )
  config.seq_len = 2048
  config.batch_size = 32
  config.total_steps = 25000
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup_steps = 375
  config.optimizer.clip_norm = 2.0
  return config
