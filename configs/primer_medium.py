"""Primer, the paper's medium size: 109,650,816 parameters.

Model and recipe are the published ones (arXiv 2109.08668, on C4 in T5's code: 65,536 tokens a
step, Adafactor, an inverse square root), but for a linear warm-up and clipping by global norm.
Variants, `configs/primer_medium.py:VARIANT`, are the paper's too: `ez`, and the baselines
`transformer` (T5's) and `transformer++` (RMSNorm and SwiGLU).

python train.py --config=configs/primer_medium.py --config.data.tfds=c4/en
"""

from triform.arch.training.config import default_config

PLAIN = {"shared_qk": False, "norm_placement": "pre"}
SWIGLU = {"gated": True, "activation": "silu", "ffn_dim": 2048}
VARIANTS = {
  "primer": {"architecture": "primer"},
  "ez": {"architecture": "primer", **PLAIN},
  "transformer": {"architecture": "primer", **PLAIN, "num_taps": 0, "activation": "relu"},
  "transformer++": {"architecture": "transformer", "norm": "rms", **SWIGLU},
}


def get_config(variant: str = "primer"):
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
  sizes = {"d_model": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072}
  options = {"vocab_size": 32000, "tie_embeddings": True, "dtype": "bfloat16"}
  config = default_config(**{**sizes, **options, **VARIANTS[variant]})
  config.seq_len = 512
  config.batch_size = 128
  config.form = "parallel"
  config.total_steps = 525_000
  config.z_loss = 1e-4
  config.optimizer.name = "adafactor"
  config.optimizer.learning_rate = 1e-2
  config.optimizer.schedule = "rsqrt"
  config.optimizer.warmup_steps = 10_000
  config.optimizer.weight_decay = 0.0
  return config
