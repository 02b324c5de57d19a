"""RetNet, the 2.7B of the paper with the published code's widths: 2,687,142,400 parameters.

The model is the published one. The recipe is ours, for small machines: 65,536 tokens a step and a
cosine, where the paper has 4M tokens and a linear decay.
Parameters, gradients and AdamW's averages take 43 GB: more than one device has, as a rule.

python train.py --config=configs/retnet_3b.py --workdir=runs/retnet_3b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=32000,
    d_model=2560,
    num_layers=32,
    num_heads=10,
    value_dim=4280,
    ffn_dim=4280,
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
