import pytest
from tiny_run import MODEL

from triform.arch.closest import closest
from triform.arch.training.config import default_config
from triform.arch.training.config_json import flatten

KNOWN = flatten(default_config(**MODEL))


@pytest.mark.parametrize(
  ("name", "meant"),
  [
    ("optimizer.lr", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("learning_rate", "optimizer.learning_rate"),
    ("optimiser.learning_rate", "optimizer.learning_rate"),
    ("steps", "total_steps"),
    ("eval.steps", "eval.every_steps"),
    ("model.heads", "model.num_heads"),
    ("model.num_head", "model.num_heads"),
    ("batch_sise", "batch_size"),
    ("eval.batch_sise", "eval.batch_size"),
    ("optimizer.beta2", None),
    ("model.foo", None),
  ],
)
def test_closest_field(name, meant):
  assert closest(name, KNOWN) == meant


def test_closest_of_nothing():
  assert closest("name", []) is None
