"""What tests of exported folders share."""

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tiny_run import tiny_config, use_corpus, write_corpus

from triform.arch import build
from triform.arch.data import python_stdlib
from triform.arch.data.tokenizers import ByteTokenizer
from triform.arch.folder import write_folder
from triform.arch.layout import split_model, to_stacked
from triform.arch.training.loop import train

MODEL = {
  "architecture": "retnet",
  "vocab_size": 257,
  "d_model": 8,
  "num_layers": 2,
  "num_heads": 2,
  "value_dim": 16,
  "ffn_dim": 8,
  "scan_layers": True,
}
IDS = np.arange(1, 13)[None]
QUERY = "params/stack/layers/mixer/query/kernel"
SCALE = "params/norm/scale"
MEAN = "variables/stack/layers/norm/mean"


def leaves_of(model):
  _, params, variables = split_model(model)
  return to_stacked({"params": params, "variables": variables})


def random_folder(path, **model):
  """An exported folder of a random model, and the model."""
  options = {**MODEL, **model}
  model = build(options, rngs=nnx.Rngs(0))
  params = {"params": split_model(model)[1]}
  config = ConfigDict({"model": options, "seq_len": 16})
  write_folder(path, config=config, tensors=to_stacked(params), vocabulary=ByteTokenizer(), step=7)
  return model


def same(a, b):
  a, b = leaves_of(a), leaves_of(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def finished_run(here):
  """A work directory `runs/tiny` in the folder `here`, beside the corpus."""
  write_corpus(here / "stdlib")
  before = python_stdlib.stdlib_root
  use_corpus(here / "stdlib")
  train(tiny_config(here), here / "runs" / "tiny")
  python_stdlib.stdlib_root = before
  return here / "runs" / "tiny"
