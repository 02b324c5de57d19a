"""RetNet, the published code's base size: 51,845,632 parameters.

The model is the published one. The recipe is ours, for small machines: 65,536 tokens a step and a
cosine, where the paper has 4M tokens and a linear decay.

python train.py --config=configs/retnet_base.py --workdir=runs/retnet_base
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=32000,
    d_model=512,
    num_layers=6,
    num_heads=2,
    value_dim=864,
    ffn_dim=864,
    decay_schedule="linspace",
    dropout=0.1,
    dtype="bfloat16",
  )
  config.seq_len = 2048
  config.batch_size = 32
  config.total_steps = 25000
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 375
  config.optimizer.clip_norm = 2.0
  return config
