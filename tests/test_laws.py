"""Every law, over every registered module. What the laws are: `laws.py`."""

import hypothesis.strategies as st
import jax
import laws
import pytest
from hypothesis import given
from laws_bench import BATCH, LENGTH, bench
from laws_cases import PIECES, SHAPES, cases, forms, splits
from laws_subjects import SUBJECTS

from triform.arch.interface import FORMS
from triform.arch.models.registry import ARCHITECTURES

DTYPES = ("float32", "bfloat16", "float64")
SEEDS = st.integers(0, 999)
ROWS, TOKENS = st.integers(0, BATCH - 1), st.integers(0, LENGTH - 1)
CUTS = st.integers(1, LENGTH - 1)
# A million, the last positions before a phase's sign changes and before counters wrap.
FAR = st.sampled_from([1_000_000, 2**31 - 3, 2**32 - LENGTH - 1])


PARAMETERS = [
  pytest.param(subject.name, marks=[pytest.mark.slow] if subject.slow else [])
  for subject in SUBJECTS.values()
  if not subject.kernel
]


# Module scope groups the tests by subject, so that its compiled programs are used while cached.
@pytest.fixture(scope="module", params=PARAMETERS)
def name(request):
  yield request.param
  bench.cache_clear()
  jax.clear_caches()


@pytest.fixture(scope="module")
def causal(name):
  """For laws of what goes on from a state."""
  if not SUBJECTS[name].causal:
    pytest.skip("sees whole sequences")
  return name


@pytest.fixture(autouse=True)
def narrowest_and_widest(request, name):
  """What mixers keep in float32, their variants and the models made of them are not asked again."""
  again = SUBJECTS[name].slow or name in ARCHITECTURES
  if again and request.node.callspec.params.get("dtype") == "float32":
    pytest.skip("a variant, or a model")


@pytest.fixture
def rounded(name, dtype):
  """For laws of results that are alike but for rounding."""
  if SUBJECTS[name].spikes and dtype != "float64":
    pytest.skip("rounding makes a spike of none")
  return dtype


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_law_1_forms_agree(name, rounded, data):
  laws.forms_agree(name, rounded, data.draw(cases(name)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
def test_law_1_forms_agree_at_any_shape(name, shape, data):
  if name in ARCHITECTURES:
    pytest.skip("its mixers are asked")
  laws.forms_agree(name, "float64", data.draw(cases(name, *shape)))


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_law_1_absent_means_default(name, form, data):
  laws.absent_means_default(name, data.draw(cases(name)), form)


def test_law_1_forms_are_three_algorithms(name):
  laws.forms_are_algorithms(name)


@given(data=st.data())
def test_law_1_forms_agree_in_training(name, data):
  if not SUBJECTS[name].trains:
    pytest.skip("neither dropout nor batch statistics")
  case = data.draw(cases(name))
  case.mask[0, 0] = True  # statistics of nothing are NaN
  laws.forms_agree(name, "float64", case, key=jax.random.key(data.draw(SEEDS)))


@given(data=st.data(), lengths=splits())
def test_law_2_splits_compose(causal, data, lengths):
  pieces = [data.draw(forms()) for _ in lengths]
  laws.splits_compose(causal, data.draw(cases(causal)), lengths, pieces, data.draw(forms()))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), cut=CUTS, pieces=st.tuples(forms(), forms()))
def test_law_2_windows_compose(causal, rounded, data, cut, pieces):
  laws.windows_compose(causal, rounded, data.draw(cases(causal)), cut, pieces)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), form=forms(), seed=SEEDS)
def test_law_3_padding_is_invisible(name, dtype, data, form, seed):
  laws.padding_is_invisible(name, dtype, data.draw(cases(name)), form, seed)


@given(data=st.data(), form=forms(), seed=SEEDS)
def test_law_3_padding_is_invisible_in_training(name, data, form, seed):
  if not SUBJECTS[name].trains:
    pytest.skip("neither dropout nor batch statistics")
  case = data.draw(cases(name))
  case.mask[0, 0] = True
  laws.padding_is_invisible(name, "float64", case, form, seed, key=jax.random.key(seed))


@given(data=st.data(), count=st.sampled_from(PIECES), form=forms(), seed=SEEDS)
def test_law_3_holes_are_skipped(name, data, count, form, seed):
  laws.holes_are_skipped(name, data.draw(cases(name)), count, form, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_law_3_masked_calls_change_nothing(name, dtype, form, data):
  laws.masked_calls_change_nothing(name, dtype, data.draw(cases(name)), form)


@given(data=st.data(), lengths=st.tuples(splits(), splits()), form=forms(), alone=forms())
def test_law_4_packing_is_separation(causal, data, lengths, form, alone):
  laws.packing_is_separation(causal, data.draw(cases(causal)), lengths, form, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), cut=CUTS, form=forms())
def test_law_4_documents_are_windows(causal, rounded, data, cut, form):
  laws.documents_are_windows(causal, rounded, data.draw(cases(causal)), cut, form)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), form=forms(), row=ROWS, token=TOKENS)
def test_law_5_outputs_are_causal(causal, dtype, data, form, row, token):
  laws.outputs_are_causal(causal, dtype, data.draw(cases(causal)), form, row, token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_law_6_state_is_constant(name, dtype):
  laws.state_is_constant(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), form=forms())
def test_rows_move(name, dtype, data, form):
  laws.rows_move(name, dtype, data.draw(cases(name)), form)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), form=forms(), position=FAR)
def test_law_7_positions_do_not_drift(causal, rounded, data, form, position):
  laws.positions_do_not_drift(causal, rounded, data.draw(cases(causal)), form, position)


@given(data=st.data(), form=forms(), position=st.one_of(FAR, st.integers(0, 99)))
def test_law_7_oracle_agrees(causal, data, form, position):
  if SUBJECTS[causal].oracle is None:
    pytest.skip("no oracle")
  laws.oracle_agrees(causal, data.draw(cases(causal)), form, position)
