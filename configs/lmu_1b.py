"""A Legendre-memory language model of the size of `retnet_1b`: 1,367,504,896 parameters.

Width, depth, vocabulary, tokens and recipe are those of `retnet_1b`; a layer remembers 512 channels
of its last 64 inputs by 16 coefficients each. A step takes 4.4 GiB a chip on 16 TPU v5e (4x4, all
on the fsdp axis), by the compiler's account.

python train.py --config=configs/lmu_1b.py --workdir=runs/lmu_1b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="lmu",
    vocab_size=32000,
    d_model=2048,
    num_layers=24,
    order=16,
    theta=64.0,
    channels=512,
    ffn_dim=4800,
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
