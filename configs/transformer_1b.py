"""Transformer++ of the size of `retnet_1b`, its baseline: 1,345,423,360 parameters.

Width, depth, vocabulary, tokens and recipe are those of `retnet_1b`; heads of 128 and a
feed-forward of 8/3 the width, as in LLaMA (arXiv 2302.13971). A step takes 2.7 GiB a chip on 16
TPU v5e (4x4, all on the fsdp axis), by the compiler's account.

python train.py --config=configs/transformer_1b.py --workdir=runs/transformer_1b

Variants, `configs/transformer_1b.py:VARIANT`: `plain` (LayerNorm, ReLU, T5's relative positions).
"""

from triform.arch.training.config import default_config

SIZES = {
  "vocab_size": 32000,
  "d_model": 2048,
  "num_layers": 24,
  "num_heads": 16,
  "dropout": 0.1,
  "dtype": "bfloat16",
  "remat": "full",
}
VARIANTS = {
  "plusplus": {"architecture": "transformer++", "ffn_dim": 5504},
  "plain": {"architecture": "transformer", "ffn_dim": 8192},
}


def get_config(variant: str = "plusplus"):
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
  config = default_config(**SIZES, **VARIANTS[variant])
  config.seq_len = 2048
  config.batch_size = 32
  config.form = "parallel"
  config.total_steps = 25000
  config.optimizer.learning_rate = 6e-4
  config.optimizer.warmup_steps = 375
  config.optimizer.clip_norm = 2.0
  return config
