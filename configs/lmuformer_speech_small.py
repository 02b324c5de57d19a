"""LMUFormer for a few thousand clips of ten words, silence and unknown ones: 390,948 parameters.

    python train.py --config=configs/lmuformer_speech_small.py --config.data.path=FOLDER
    python eval.py --workdir=runs/lmuformer_speech_small

README has what it reaches on 3,416 clips; an epoch of them takes 24 s on one core of a CPU. Other
than as published: frames every 20 ms, two blocks, four channels of each memory, and convolutions of
which the first three share their weights over frequency. `:causal` has convolutions that see no
later frame. `:spiking_ms` has spiking neurons, which learn more slowly: more of them that fire and
forget sooner, a surrogate with wider tails, more channels of convolutions and memories (807,852 in
all), and twice as many updates at a higher rate; an epoch takes 78 s.
"""

from triform.arch.training.config import default_config

MODELS = {
  "plain": {"padding": "same"},
  "causal": {"padding": "causal"},
  "spiking_ms": {
    "padding": "same",
    "variant": "spiking_ms",
    "threshold": 0.5,
    "tau": 1.2,
    "surrogate": "atan",
  },
}


def get_config(variant: str = "plain"):
  if variant not in MODELS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(MODELS)}")
  spiking = variant == "spiking_ms"
  config = default_config(
    "speech",
    architecture="lmuformer",
    front_end="fbank(frame_shift=20.0)",
    in_features=40,
    num_classes=12,
    d_model=128,
    num_layers=2,
    mlp_ratio=2,
    stem_channels=(64, 96, 128) if spiking else (16, 24, 32),
    order=32 if spiking else 64,
    theta=50.0,
    memory_channels=16 if spiking else 4,
    dropout=0.1,
    **MODELS[variant],
  )
  config.form = "parallel"
  config.batch_size = 16 if spiking else 32
  config.total_epochs = 60.0
  config.log_every_steps = 106
  config.label_smoothing = 0.1
  config.average_decay = 0.999
  config.augment.gain = 6.0
  config.augment.speed = 0.1
  config.augment.shift = 100.0
  config.augment.noise = 0.8
  config.augment.prefixes = 0.25
  config.augment.frequency_masks = 2
  config.augment.frequency_width = 6
  config.augment.time_masks = 2
  config.augment.time_width = 8
  config.optimizer.learning_rate = 7e-3 if spiking else 2e-3
  config.optimizer.warmup_steps = 300
  config.optimizer.final_fraction = 0.01
  config.eval.form = "parallel"
  config.eval.every_steps = 530
  config.checkpoint.every_steps = 530
  return config
