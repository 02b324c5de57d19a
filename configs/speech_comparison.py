"""Every architecture of this library on spoken words, at equal work: pick one by its name.

    python train.py --config=configs/speech_comparison.py:retnet --config.data.path=FOLDER

FOLDER has twelve classes. All, LMUFormer with 123,684 parameters, have the same front end,
convolutions and width, and are trained alike for 20 epochs. A second of audio takes them 10.1 to
10.3 million multiply-accumulates, the front end's 0.9 among them; spiking ones, of the same sizes,
have additions in the place of most.
"""

from triform.arch.training.config import default_config

MEMORY = {"order": 32, "theta": 50.0}
# Widths of feed-forwards are what makes the work equal.
ENCODERS = {
  "retnet": ("retention(value_dim=64)", 66),
  "hypermixer": ("hypermixing(mixing_dim=64)", 162),
  "hypermixer_bidirectional": ("bidirectional_hypermixing(mixing_dim=64)", 162),
  "primer": ("mdha", 134),
  "transformer": ("attention", 92),
  "lmu": ("lmu(order=32, theta=50.0)", 106),
}
LMUFORMERS = {
  "lmuformer": {"padding": "same"},
  "lmuformer_causal": {"padding": "causal"},
  "lmuformer_spiking_ms": {"padding": "same", "variant": "spiking_ms", "threshold": 0.5},
  "lmuformer_spiking": {"padding": "same", "variant": "spiking", "threshold": 0.5},
}
MODELS = [*LMUFORMERS, *ENCODERS]


def get_config(name: str = "lmuformer"):
  sizes = {
    "front_end": "fbank(frame_shift=20.0)",
    "in_features": 40,
    "num_classes": 12,
    "d_model": 64,
    "num_layers": 2,
    "stem_channels": (16, 24, 32),
    "dropout": 0.1,
  }
  if name in LMUFORMERS:
    own = {"mlp_ratio": 2, "memory_channels": 4, **MEMORY, **LMUFORMERS[name]}
    config = default_config("speech", architecture="lmuformer", **sizes, **own)
  elif name in ENCODERS:
    pattern, ffn_dim = ENCODERS[name]
    own = {"num_heads": 4, "pattern": pattern, "ffn_dim": ffn_dim}
    if name == "primer":
      own |= {"gated": False, "activation": "squared_relu"}
    config = default_config("speech", architecture="encoder", **sizes, **own)
  else:
    raise ValueError(f"there is no architecture {name!r}, expected one of {', '.join(MODELS)}")
  config.form = "parallel"
  config.batch_size = 32
  config.total_epochs = 20.0
  config.log_every_steps = 106  # an epoch
  config.label_smoothing = 0.1
  config.average_decay = 0.998
  config.augment.gain = 6.0
  config.augment.speed = 0.1
  config.augment.shift = 100.0
  config.augment.noise = 0.8
  config.augment.frequency_masks = 2
  config.augment.frequency_width = 6
  config.augment.time_masks = 2
  config.augment.time_width = 8
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 200
  config.optimizer.final_fraction = 0.01
  config.eval.form = "parallel"
  config.eval.every_steps = 530
  config.checkpoint.every_steps = 1060
  return config
