"""A Legendre Memory Unit on permuted sequential MNIST: 56,828 parameters.

    python train.py --config=configs/lmu_psmnist.py --config.data.path=FOLDER
    python eval.py --workdir=runs/lmu_psmnist

FOLDER has the four files of MNIST. Three minutes on two CPU cores; 98.45 % of the test digits
(seeds 1 and 2: 98.29 and 98.18 %). The published network of this size, with feedback, has 97.15 %,
and the parallel one of order 468 and 346 hidden units 98.49 %.
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
    dropout=0.2,
  )
  config.data.permutation_seed = 0
  config.form = "parallel"
  config.batch_size = 100
  config.total_epochs = 50.0
  config.log_every_steps = 550  # an epoch
  config.optimizer.learning_rate = 2e-3
  config.optimizer.b2 = 0.999
  config.optimizer.weight_decay = 0.05
  config.optimizer.final_fraction = 0.0
  config.eval.form = "parallel"
  config.eval.every_steps = 2750
  config.checkpoint.every_steps = 2750
  return config
