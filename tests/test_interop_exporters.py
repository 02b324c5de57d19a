"""Models of ours as state dicts of the libraries they can be imported from."""

import numpy as np
import pytest
from flax import nnx
from published import FUSED, LAYOUTS, PLAIN, fixture, same

from triform.arch import build
from triform.arch.interop import (
  from_fla,
  from_torchscale,
  to_fla,
  to_torchscale,
)


@LAYOUTS
def test_to_fla_is_the_inverse_of_from_fla(scan_layers):
  config, params = fixture("fla")
  back, arrays = to_fla(from_fla(config, params, scan_layers=scan_layers))
  assert arrays.keys() == {name.replace(PLAIN, FUSED) for name in params}
  for name, array in params.items():
    got = arrays[name.replace(PLAIN, FUSED)]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
  same(from_fla(back, arrays), from_fla(config, params))
  assert {"model_type": "retnet", "hidden_size": 32, "fuse_norm": True}.items() <= back.items()


def test_to_fla_of_other_widths_and_shared_heads():
  for key_dim, value_dim in ((60, 28), (8, 60)):  # int(22 * (60 / 22)) is 59
    widths = {"d_model": 22, "num_kv_heads": 1, "key_dim": key_dim, "value_dim": value_dim}
    model = retnet(**{**FLA, **widths})
    config, params = to_fla(model)
    assert int(22 * config["expand_k"]) == key_dim and int(22 * config["expand_v"]) == value_dim
    same(from_fla(config, params, scan_layers=False), model)


def retnet(**options):
  return build({"architecture": "retnet", "scan_layers": False, **options}, rngs=nnx.Rngs(0))


SMALL = {
  "vocab_size": 20,
  "d_model": 8,
  "num_layers": 1,
  "num_heads": 2,
  "value_dim": 8,
  "ffn_dim": 8,
}
FLA = {**SMALL, "dialect": "fla", "embedding_scale": 1.0}


@pytest.mark.parametrize(
  ("export", "options", "message"),
  [
    (to_fla, SMALL, "dialect is 'torchscale', which cannot be converted; expected 'fla'"),
    (to_fla, {**FLA, "decay": "learned"}, "decay is 'learned', .*expected 'fixed'"),
    (to_fla, {**FLA, "activation": "gelu"}, "activation is 'gelu', .*expected 'silu'"),
    (to_fla, {**FLA, "embedding_scale": 2.0}, "embedding_scale is 2.0, .*expected 1.0"),
    (
      to_fla,
      {**FLA, "decay_schedule": "linspace"},
      "decay_schedule is 'linspace'",
    ),
    (to_torchscale, FLA, "dialect is 'fla', which cannot be converted; expected 'torchscale'"),
    (to_torchscale, {**SMALL, "decay": "gated"}, "decay is 'gated', .*expected 'fixed'"),
    (to_torchscale, {**SMALL, "num_kv_heads": 1}, "num_kv_heads is 1, .*expected 2"),
    (to_torchscale, {**SMALL, "key_dim": 4}, "key_dim is 4, .*expected 8"),
    (to_torchscale, {**SMALL, "embedding_scale": 2.0}, "embedding_scale is 2.0, .*expected 1.0 or"),
  ],
)
def test_what_the_other_library_has_not_is_not_exported(export, options, message):
  with pytest.raises(ValueError, match=message):
    export(retnet(**options))


@LAYOUTS
def test_to_torchscale_is_the_inverse_of_from_torchscale(scan_layers):
  config, params = fixture("torchscale")
  model = from_torchscale(config, params, scan_layers=scan_layers)
  back, arrays = to_torchscale(model)
  assert arrays.keys() == params.keys()
  for name, array in params.items():
    assert arrays[name].dtype == np.float32
    if name.startswith("retnet_rel_pos"):  # computed, in a higher precision than torchscale does
      np.testing.assert_allclose(arrays[name], array, rtol=1e-6)
    else:
      np.testing.assert_array_equal(arrays[name], array, err_msg=name)
  same(from_torchscale(back, arrays, scan_layers=scan_layers), model)
  known = config.keys() & back.keys()
  assert {name: back[name] for name in known} == {name: config[name] for name in known}


def test_to_torchscale_with_a_tied_output():
  model = retnet(**SMALL, tie_embeddings=True, activation="gelu", decay_schedule="linspace")
  config, params = to_torchscale(model)
  assert params["output_projection.weight"] is params["embed_tokens.weight"]
  assert config["share_decoder_input_output_embed"] and config["activation_fn"] == "gelu"
  assert not config["no_scale_embedding"]
  again = from_torchscale(config, params, scan_layers=False)
  ids = np.arange(6)[None]
  np.testing.assert_allclose(again(ids)[0], model(ids)[0], atol=1e-5)
