"""A Legendre Memory Unit on permuted sequential MNIST: 56,828 parameters.

    python train.py --config=configs/lmu_psmnist.py --config.data.path=FOLDER
    python eval.py --workdir=runs/lmu_psmnist

FOLDER has the four files of MNIST. The result is yet to be measured.
"""

from triform.arch.training.config import default_config


def get_config():
  config = default_config(
    architecture="lmu_classifier",
    in_features=1,
    num_classes=10,
    order=256,
    theta=784.0,
    hidden_size=212,
  )
  config.data.permutation_seed = 0
  config.form = "parallel"
  config.batch_size = 100
  config.total_epochs = 10.0
  config.log_every_steps = 50
  config.optimizer.learning_rate = 1e-3
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.0
  config.optimizer.final_fraction = 0.0
  config.eval.form = "parallel"
  config.eval.every_steps = 550  # an epoch
  config.checkpoint.every_steps = 550
  return config
