"""RetNet for an hour on two CPU cores: 7,605,504 parameters.

python train.py --config=configs/retnet_small.py --workdir=runs/retnet_small
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=4096,
    d_model=256,
    num_layers=6,
    num_heads=4,
    value_dim=512,
    ffn_dim=512,
    decay_schedule="linspace",
    scan_layers=False,
  )
  config.batch_size = 4
  config.total_steps = 7000
  config.optimizer.learning_rate = 3e-3
  return config
