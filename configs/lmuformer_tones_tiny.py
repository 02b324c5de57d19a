"""LMUFormer, causal, on made-up words, from samples: 25,454 parameters.

    python train.py --config=configs/lmuformer_tones_tiny.py
    python eval.py --workdir=runs/lmuformer_tones_tiny

A minute and a half on one core of a CPU; all of the 500 test clips are recognised. That is easy:
two vowels gliding into each other tell nothing about speech, but that all of this works.
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    "tones",
    architecture="lmuformer",
    front_end="fbank",
    in_features=40,
    num_classes=10,
    d_model=32,
    num_layers=1,
    mlp_ratio=2,
    order=16,
    theta=100.0,
    memory_channels=4,
  )
  config.form = "parallel"
  config.batch_size = 50
  config.total_epochs = 12.0
  config.log_every_steps = 40  # an epoch
  config.augment.time_masks = 1
  config.augment.time_width = 10
  config.augment.prefixes = 0.25
  config.optimizer.learning_rate = 5e-3
  config.optimizer.final_fraction = 0.0
  config.eval.form = "parallel"
  config.eval.every_steps = 160
  config.checkpoint.every_steps = 160
  return config
