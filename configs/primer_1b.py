"""Primer, the 1.9B of the paper as far as that is printed: 1,677,136,384 parameters.

The largest model there does not share queries and keys (arXiv 2109.08668, section 4.4). Its heads
and vocabulary are not printed; with 32,000 tokens and one table for embedding and head there are
fewer parameters than it had. The recipe is ours, for small machines, as in `retnet_1b`. A step
takes 3.9 GiB a chip on 16 TPU v5e (4x4, all on the fsdp axis), by the compiler's account.

python train.py --config=configs/primer_1b.py --workdir=runs/primer_1b
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="primer",
    vocab_size=32000,
    d_model=2048,
    num_layers=24,
    num_heads=16,
    ffn_dim=12288,
    shared_qk=False,
    dtype="bfloat16",
    remat="full",
  )
  config.seq_len = 1024
  config.batch_size = 64
  config.total_steps = 25000
  config.optimizer.learning_rate = 6e-4
  config.optimizer.warmup_steps = 375
  return config
