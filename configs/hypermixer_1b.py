"""A causal HyperMixer of the size of `retnet_1b`: 1,352,258,304 parameters.

Width, depth, vocabulary, tokens and recipe are those of `retnet_1b`. HyperMixing has few
parameters, so that most are the feed-forward's; heads of 64, because what mixing costs on vector
units falls with their number. A step takes 4.5 GiB a chip on 16 TPU v5e (4x4, all on the fsdp
axis), by the compiler's account.

python train.py --config=configs/hypermixer_1b.py --workdir=runs/hypermixer_1b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="hypermixer",
    vocab_size=32000,
    d_model=2048,
    num_layers=24,
    num_heads=32,
    mixing_dim=2048,
    ffn_dim=12288,
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
