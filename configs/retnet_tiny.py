"""RetNet on the Python standard library's own source, for a laptop.

    python train.py --config=configs/retnet_tiny.py
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=4096,
    d_model=256,
    num_layers=4,
    num_heads=4,
    value_dim=512,
    ffn_dim=512,
    decay_schedule="linspace",
    dtype="float32",
    scan_layers=False,
  )
  config.total_steps = 1000
  config.optimizer.learning_rate = 3e-3
  return config
