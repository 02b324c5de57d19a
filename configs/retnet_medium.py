"""RetNet, the published code's medium size: 268,993,536 parameters.

The model is the published one. The recipe is ours, for small machines: 65,536 tokens a step and a
cosine, where the paper has 4M tokens and a linear decay.

python train.py --config=configs/retnet_medium.py --workdir=runs/retnet_medium
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=32000,
    d_model=1024,
    num_layers=16,
    num_heads=4,
    value_dim=1728,
    ffn_dim=1728,
    decay_schedule="linspace",
    dropout=0.1,
    dtype="bfloat16",
  )
  config.seq_len = 2048
  config.batch_size = 32
  config.total_steps = 25000
  config.optimizer.learning_rate = 6e-4
  config.optimizer.warmup_steps = 375
  config.optimizer.clip_norm = 2.0
  return config
