"""RetNet, the 1.3B of the paper with the published code's widths: 1,351,714,816 parameters.

The model is the published one. The recipe is ours, for small machines: 65,536 tokens a step and a
cosine, where the paper has 4M tokens and a linear decay. A step takes 3.2 GiB a chip on 16 TPU v5e
(4x4, all on the fsdp axis, layers computed again in the backward pass), by the compiler's account.

python train.py --config=configs/retnet_1b.py --workdir=runs/retnet_1b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="retnet",
    vocab_size=32000,
    d_model=2048,
    num_layers=24,
    num_heads=8,
    value_dim=3456,
    ffn_dim=3456,
    decay_schedule="linspace",
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
