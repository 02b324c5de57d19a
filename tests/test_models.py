import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from triform.arch import RetNet, build
from triform.arch.layout import from_stacked, split_model, to_stacked
from triform.arch.mixers.retention import log_decays
from triform.arch.models import complete, fields

OPTIONS = {
  "vocab_size": 11, "d_model": 8, "num_layers": 3, "num_heads": 2, "value_dim": 8, "ffn_dim": 8,
}  # fmt: skip


def make(**changes):
  return build({"architecture": "retnet", **OPTIONS, **changes}, rngs=nnx.Rngs(0))


def test_an_unknown_option_names_the_closest():
  with pytest.raises(ValueError, match="'num_head' is unknown to retnet; did you mean 'num_heads'"):
    make(num_head=3)


def test_an_option_like_no_other_lists_all():
  with pytest.raises(ValueError, match="'foo' is unknown to retnet; it has activation, chunk_size"):
    make(foo=3)


def test_fields_are_all_options_with_their_types():
  model = {"architecture": "retnet", **OPTIONS}
  config = ConfigDict(fields(model))
  assert config.num_kv_heads is None and config.get_type("num_kv_heads") is int
  assert config.get_type("scan_layers") is bool and config.get_type("dtype") is str
  assert config.eps == 1e-6 and config.num_heads == 2
  assert complete(config) == complete(model)
  built, plain = (nnx.eval_shape(lambda c=c: build(c, rngs=nnx.Rngs(0))) for c in (config, model))
  assert nnx.graphdef(built) == nnx.graphdef(plain)


def test_an_unknown_architecture_names_the_known():
  with pytest.raises(ValueError, match=r"architecture is 'rnn', expected one of .*retnet, tr"):
    build({"architecture": "rnn"}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_heads": 3}, "key_dim 8 is not divisible by num_heads 3"),
    ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ({"num_heads": 8}, "key size 1 per head is odd"),
    ({"decay": "none"}, "decay is 'none', expected fixed, learned or gated"),
    ({"dialect": "x"}, "dialect is 'x', expected torchscale or fla"),
    ({"decay_schedule": "x"}, "decay_schedule is 'x', expected geometric or linspace"),
    ({"activation": "tanh"}, "activation is 'tanh', expected one of gelu, relu, silu"),
  ],
)
def test_bad_options_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    make(**change)


def test_scanned_and_unrolled_start_alike_and_convert():
  scanned, unrolled = (split_model(make(scan_layers=scan))[1] for scan in (True, False))
  stacked = to_stacked(unrolled)
  assert stacked.keys() == to_stacked(scanned).keys()
  for name, leaf in to_stacked(scanned).items():
    np.testing.assert_array_equal(leaf, stacked[name])
  assert stacked["stack/layers/mixer/query/kernel"].shape == (3, 8, 8)
  jax.tree.map(np.testing.assert_array_equal, from_stacked(stacked, unrolled), unrolled)
  jax.tree.map(np.testing.assert_array_equal, from_stacked(stacked, scanned), scanned)


def test_ten_layers_keep_their_order():
  params = split_model(make(num_layers=12, scan_layers=False))[1]
  stacked = to_stacked(params)
  kernel = stacked["stack/layers/mixer/query/kernel"]
  np.testing.assert_array_equal(
    kernel[10], params["stack"]["layers"][10]["mixer"]["query"]["kernel"]
  )


def test_paper_decays_have_the_stated_half_lives():
  model = RetNet(**OPTIONS, decay_schedule="linspace", scan_layers=False, rngs=nnx.Rngs(0))
  mixer = model.stack.layers[0].mixer
  half_lives = np.log(2) / -log_decays(mixer.num_heads, mixer.decay_schedule)
  np.testing.assert_allclose(half_lives, [21.8, 354.5], rtol=0.01)


def test_bfloat16_compute_keeps_float32_parameters_and_state():
  model = make(dtype="bfloat16", scan_layers=False)
  assert {leaf.dtype for leaf in jax.tree.leaves(split_model(model)[1])} == {np.dtype("float32")}
  logits, state = model(np.zeros((1, 5), np.int32))
  assert logits.dtype == np.float32
  assert state[0].kv.dtype == np.float32
  features, _ = model.encode(np.zeros((1, 5), np.int32))
  assert features.dtype == "bfloat16"
