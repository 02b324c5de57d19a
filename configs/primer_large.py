"""Primer, the paper's large size: 536,553,984 parameters.

Model and recipe are the published ones (arXiv 2109.08668, on C4 in T5's code: a million tokens a
step, Adafactor, an inverse square root), but for a linear warm-up and clipping by global norm.
Variants, `configs/primer_large.py:VARIANT`, are the paper's too: `ez`, and the baselines
`transformer` (T5's) and `transformer++` (RMSNorm and SwiGLU).

python train.py --config=configs/primer_large.py --config.data.tfds=c4/en
"""

from triform.arch.training.config import default_config

PLAIN = {"shared_qk": False, "norm_placement": "pre"}
SWIGLU = {"gated": True, "activation": "silu", "ffn_dim": 5440}
VARIANTS = {
  "primer": {"architecture": "primer"},
  "ez": {"architecture": "primer", **PLAIN},
  "transformer": {"architecture": "primer", **PLAIN, "num_taps": 0, "activation": "relu"},
  "transformer++": {"architecture": "transformer", "norm": "rms", **SWIGLU},
}


def get_config(variant: str = "primer"):
  if variant not in VARIANTS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
  sizes = {"d_model": 1024, "num_layers": 24, "num_heads": 16, "ffn_dim": 8192}
  options = {"vocab_size": 32000, "tie_embeddings": True, "dtype": "bfloat16"}
  config = default_config(**{**sizes, **options, **VARIANTS[variant]})
  config.seq_len = 512
  config.batch_size = 2048
  config.form = "parallel"
  config.total_steps = 1_000_000
  config.z_loss = 1e-4
  config.optimizer.name = "adafactor"
  config.optimizer.learning_rate = 1e-2
  config.optimizer.schedule = "rsqrt"
  config.optimizer.warmup_steps = 10_000
  config.optimizer.weight_decay = 0.0
  return config
