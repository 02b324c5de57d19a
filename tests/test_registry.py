"""One file adds an architecture: to trainer, evaluator, laws, counter and configurations."""

import hypothesis.strategies as st
import laws
import numpy as np
import pytest
from counted import abstract, calls, closed, traced
from hypothesis import given
from laws_cases import cases, forms, splits
from laws_subjects import register_architecture
from tiny_run import use_corpus, write_corpus
from toy_architecture import FadingModel, get_config

from triform.arch import generate, load
from triform.arch.data import python_stdlib
from triform.arch.data.packing import Documents
from triform.arch.evaluation import evaluate
from triform.arch.flops.report import report
from triform.arch.interface import FORMS
from triform.arch.models.registry import ARCHITECTURES, find, register
from triform.arch.training import workdir as workdirs
from triform.arch.training.loop import train

register_architecture("fading")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A few steps of what the file describes, and where they are kept."""
  folder = tmp_path_factory.mktemp("toy")
  write_corpus(folder / "stdlib")
  config = get_config()
  config.data.dir = str(folder / "data")
  config.update(log_every_steps=1, compilation_cache=False, peak_flops=1e12)
  config.eval.update(max_tokens=64, seq_len=16, batch_size=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(python_stdlib, "stdlib_root", None)
    use_corpus(folder / "stdlib")
    assert train(config, folder / "run")
  return config, folder / "run"


def test_it_trains_and_is_evaluated_the_same_in_all_forms(run):
  _, workdir = run
  model, tokenizer = load(workdir)
  assert isinstance(model, FadingModel)
  documents = Documents.from_arrays([tokenizer.encode("name1 = 2\n" * 20)])
  losses = [
    evaluate(model, documents, tokenizer, form=form, seq_len=13, batch_size=1)["loss"]
    for form in FORMS
  ]
  np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
  assert losses[0] < 0.8 * np.log(257)
  assert generate(model, [tokenizer.bos_id], max_new_tokens=3).shape == (1, 3)


def test_it_resumes_with_its_free_options_changed(run):
  config, workdir = run
  assert workdirs.check(workdir, config) == []
  changed = config.copy_and_resolve_references()
  changed.model.piece_size = 8
  assert workdirs.check(workdir, changed) == ["model.piece_size: 4 -> 8"]
  changed.model.ffn_dim = 8
  with pytest.raises(ValueError, match="ffn_dim"):
    workdirs.check(workdir, changed)


@given(data=st.data())
def test_it_is_held_to_law_1(data):
  laws.forms_agree("fading", "float32", data.draw(cases("fading")))


@given(data=st.data(), lengths=splits())
def test_it_is_held_to_law_2(data, lengths):
  pieces = [data.draw(forms()) for _ in lengths]
  laws.splits_compose("fading", data.draw(cases("fading")), lengths, pieces, data.draw(forms()))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_counted(form):
  model = abstract({"architecture": "fading", **ARCHITECTURES["fading"].small})
  for call in calls(7, form):
    assert closed(model, call) == traced(model, call), call
  told = report(get_config())
  assert told["forward_matmul_flops_per_token"] == 2 * (2 * (16 * 16 + 3 * 16 * 24) + 16 * 257)


def test_a_name_belongs_to_one_class():
  with pytest.raises(ValueError, match="architecture 'fading' is FadingModel already"):

    @register("fading", small={})
    class Other(FadingModel):
      pass

  assert find("fading").model is FadingModel
