"""LMUFormer as published, on the 35 words of Speech Commands: 1,621,796 parameters.

    python train.py --config=configs/lmuformer_speech_commands.py --config.data.path=ARCHIVE

ARCHIVE is `speech_commands_v0.02.tar.gz`, or the folder that it was unpacked to. `:causal` has
convolutions that see no later frame, `:spiking_ms` and `:spiking` are the published spiking ones.
Published with this recipe: 96.53 % of the test clips, spiking 96.12 %; not run here, where there is
no such archive. Other than in the published code

- a clip is its own frames; there, 30 of 128 are padding, and they count in the mean;
- masked stripes are set to the mean; there, to 0 before normalisation, which is 0.62 behind it;
- what is shifted out does not come in again at the other end;
- noise is the data set's recordings, of mean 0; there, uniform numbers above 0 on the features;
- a clip is mixed with one of its batch; there, with any;
- the feature of mel filter 3, which sees nothing, is 0 instead of a constant;
- the learning rate falls in every step; there, every ten epochs, the first ten at its peak;
- all is computed in float32; there, in float16 where PyTorch's autocast says so;
- the last checkpoint is what is evaluated; there, the one of the best validation accuracy
  (`--config.checkpoint.best` and `eval.py --best` take that of the lowest validation loss).
"""

from triform.arch.training.config import default_config

MODELS = {
  "plain": {"padding": "same"},
  "causal": {"padding": "causal"},
  "spiking_ms": {"padding": "same", "variant": "spiking_ms"},
  "spiking": {"padding": "same", "variant": "spiking"},
}


def get_config(variant: str = "plain"):
  if variant not in MODELS:
    raise ValueError(f"variant is {variant!r}, expected one of {', '.join(MODELS)}")
  config = default_config(
    "speech",
    architecture="lmuformer",
    front_end="fbank",
    in_features=128,
    num_classes=35,
    d_model=256,
    num_layers=1,
    mlp_ratio=4,
    theta=128.0,
    **MODELS[variant],
  )
  config.form = "parallel"
  config.batch_size = 128
  config.total_epochs = 200.0
  config.log_every_steps = 100
  config.objective = "sigmoid"
  config.augment.shift = 100.0
  config.augment.mixup = 0.6
  config.augment.mixup_alpha = 10.0
  config.augment.noise = 0.5
  config.augment.frequency_masks = 1
  config.augment.frequency_width = 48
  config.augment.time_masks = 1
  config.augment.time_width = 48
  config.optimizer.learning_rate = 2.5e-3
  config.optimizer.schedule = "exponential"
  config.optimizer.warmup_steps = 0
  config.optimizer.final_fraction = 0.85**19
  config.optimizer.b1 = 0.95
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1e9  # none
  config.eval.form = "parallel"
  config.eval.every_steps = 663  # an epoch
  config.checkpoint.every_steps = 663
  return config
