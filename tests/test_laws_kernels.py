"""The laws, where the chunkwise form of a layer or a model is a kernel, interpreted.

In the dtypes that kernels take, and always with that form; what the laws are: `laws.py`.
"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from laws_bench import BATCH, LENGTH, bench, floats
from laws_cases import cases
from laws_errors import equations
from laws_subjects import SUBJECTS

from triform.arch.interface import FORMS

FORM = "chunkwise"
SEEDS, CUTS = st.integers(0, 999), st.integers(1, LENGTH - 1)
# An example is slower than others': three where they have five, one where it is of 30 positions.
FEWER, FEWEST = (settings(max_examples=settings().max_examples * n // 5) for n in (3, 1))
PARAMETERS = [
  pytest.param(subject.name, marks=[pytest.mark.slow] if subject.slow else [])
  for subject in SUBJECTS.values()
  if subject.kernel
]


@pytest.fixture(scope="module", params=PARAMETERS)
def name(request):
  yield request.param
  bench.cache_clear()
  jax.clear_caches()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request, name):
  if request.param == "float32" and SUBJECTS[name].table is not None:
    pytest.skip("a model: its mixers are asked")
  return request.param


def test_the_kernel_runs(name, dtype):
  """In that form and these dtypes, in steps of more than one chunk, forward and backward."""
  one = bench(name, dtype)
  x = one._inputs(SUBJECTS[name].inputs(np.random.default_rng(0), BATCH, LENGTH))

  def loss(params, form):
    module = nnx.merge(one.graphdef, params, one.rest)
    y, after = module(x, one.init_state(), form=form)
    return sum(jnp.sum(a.astype(jnp.float32)) for a in floats((y, after)))

  for form in FORMS:
    found = equations(jax.grad(functools.partial(loss, form=form)), one.params)
    kernels = [e.params for e in found if e.primitive.name == "pallas_call"]
    assert bool(kernels) == (form == FORM)
    assert all(kernel["grid_mapping"].grid == (BATCH, 2, 2) for kernel in kernels)


@FEWER
@given(data=st.data())
def test_law_1_forms_agree(name, dtype, data):
  laws.forms_agree(name, dtype, data.draw(cases(name)))


def test_law_1_forms_are_three_algorithms(name):
  laws.forms_are_algorithms(name)


@FEWER
@given(data=st.data(), cut=CUTS, pieces=st.permutations([FORM, "recurrent"]))
def test_law_2_windows_compose(name, dtype, data, cut, pieces):
  laws.windows_compose(name, dtype, data.draw(cases(name)), cut, pieces)


@FEWER
@given(data=st.data(), seed=SEEDS)
def test_law_3_padding_is_invisible(name, dtype, data, seed):
  laws.padding_is_invisible(name, dtype, data.draw(cases(name)), FORM, seed)


@FEWER
@given(data=st.data())
def test_law_3_masked_calls_change_nothing(name, dtype, data):
  laws.masked_calls_change_nothing(name, dtype, data.draw(cases(name)), FORM)


@FEWER
@given(data=st.data(), cut=CUTS)
def test_law_4_documents_are_windows(name, dtype, data, cut):
  laws.documents_are_windows(name, dtype, data.draw(cases(name)), cut, FORM)


@FEWER
@given(data=st.data(), row=st.integers(0, BATCH - 1), token=st.integers(0, LENGTH - 1))
def test_law_5_outputs_are_causal(name, dtype, data, row, token):
  laws.outputs_are_causal(name, dtype, data.draw(cases(name)), FORM, row, token)


def test_law_6_state_is_constant(name, dtype):
  laws.state_is_constant(name, dtype)


@FEWER
@given(data=st.data())
def test_rows_move(name, dtype, data):
  laws.rows_move(name, dtype, data.draw(cases(name)), FORM)


@FEWEST
@given(data=st.data())
def test_law_7_positions_do_not_drift(name, dtype, data):
  laws.positions_do_not_drift(name, dtype, data.draw(cases(name)), FORM, 1_000_000)
