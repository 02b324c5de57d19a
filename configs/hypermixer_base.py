"""Causal HyperMixer of the width and depth of the paper's encoder: 10,701,376 parameters.

Width 256, 8 layers and 512 hidden units, in the mixing and in the feed-forward, are what others'
implementations have for the paper (arXiv 2203.03691); heads as in HyperConformer, without which a
causal layer costs eight times as much. Vocabulary, tokens and recipe are ours.

python train.py --config=configs/hypermixer_base.py --workdir=runs/hypermixer_base
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="hypermixer",
    vocab_size=32000,
    d_model=256,
    num_layers=8,
    num_heads=8,
    mixing_dim=512,
    ffn_dim=512,
    tie_embeddings=True,
    dropout=0.1,
    dtype="bfloat16",
  )
  config.seq_len = 512
  config.batch_size = 64
  config.total_steps = 100_000
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 2000
  return config
