"""Streams that come in any pieces, against the model on all of each at once; and words in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from triform.arch import Encoder, build, take_rows
from triform.arch.models.classifier import Classifier
from triform.arch.recognition import Recognizer, Spotter, _programs

MODEL = {
  "architecture": "lmuformer",
  "front_end": "fbank(sample_frequency=1000.0)",  # a frame is 25 samples, every 10
  "in_features": 4,
  "num_classes": 3,
  "d_model": 8,
  "num_layers": 1,
  "mlp_ratio": 2,
  "order": 4,
  "theta": 6.0,
  "chunk_size": 4,
  "scan_layers": False,
}
LABELS = ("yes", "no", "_silence_")
LONGEST = 600  # samples of a document
STREAMS = 4  # but where it matters, so that programs are compiled once
ROWS = 20  # documents that are compared at once, likewise
PADDINGS = ("causal", "same")


def make_model(**changes):
  """With an answer that depends on what is heard, which at first is nearly the same for all."""
  model = build({**MODEL, **changes}, rngs=nnx.Rngs(0))
  model.head.kernel[...] *= 3000
  return model


MODELS = {padding: make_model(padding=padding) for padding in PADDINGS}


def reference(model, documents):
  """Posteriors of documents, each of which the model sees alone and at once."""
  split, rows = nnx.split(model), -(-len(documents) // ROWS) * ROWS
  samples, lengths = np.zeros((rows, LONGEST), np.float32), np.zeros(rows, int)
  for i, document in enumerate(documents):
    samples[i, : len(document)], lengths[i] = document, len(document)
  posteriors = [
    _whole(*split, samples[i : i + ROWS], lengths[i : i + ROWS]) for i in range(0, rows, ROWS)
  ]
  return np.concatenate(posteriors)[: len(documents)]


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, state, samples, lengths):
  mask = jnp.arange(samples.shape[1])[None] < lengths[:, None]
  return jax.nn.softmax(nnx.merge(graphdef, state)(samples, mask=mask)[0], axis=-1)


def noise(*shape, seed=0):
  return (0.1 * np.random.RandomState(seed).randn(*shape)).astype(np.float32)


@pytest.mark.parametrize("padding", [pytest.param("causal", marks=pytest.mark.slow), "same"])
@given(data=st.data())
def test_any_pieces_answer_for_the_document_so_far(padding, data):
  """Streams join, end and pause where they like, in calls of any size."""
  model, streams = MODELS[padding], STREAMS
  recognizer = Recognizer(model, LABELS, streams=streams)
  documents = [np.zeros(0, np.float32)] * streams
  rng = np.random.RandomState(data.draw(st.integers(0, 2**31)))
  for n in data.draw(st.lists(st.sampled_from([1, 3, 9, 10, 11, 27, 75, 160, 233]), max_size=6)):
    samples, lengths = noise(streams, n, seed=rng.randint(2**31)), rng.randint(0, n + 1, streams)
    lengths[rng.rand(streams) < 0.3] = n
    reset = rng.rand(streams) < 0.3
    for i in range(streams):
      before = documents[i][:0] if reset[i] and lengths[i] else documents[i]
      documents[i] = np.concatenate([before, samples[i, : lengths[i]]])
      if len(documents[i]) > LONGEST:
        documents[i], lengths[i], reset[i] = samples[i, :n], n, True
    got = recognizer.push(samples, lengths=lengths, reset=reset)
    assert got.dtype == np.float32 and got.shape == (streams, 3)
    np.testing.assert_allclose(got, reference(model, documents), atol=1e-5)
    assert recognizer.heard.tolist() == [len(document) for document in documents]


@pytest.mark.parametrize("padding", PADDINGS)
def test_every_prefix_of_a_clip(padding):
  model, clip = MODELS[padding], noise(1, 180)
  recognizer = Recognizer(model, LABELS)
  got = [recognizer.push(clip[:, i : i + 1])[0] for i in range(clip.shape[1])]
  expected = reference(model, [clip[0, : i + 1] for i in range(clip.shape[1])])
  np.testing.assert_allclose(np.stack(got), expected, atol=1e-5)
  assert np.ptp(expected, axis=0).max() > 0.1  # or it would all be the same


def test_a_thousand_streams_are_as_each_alone():
  model, streams, rng = MODELS["same"], 1000, np.random.RandomState(0)
  recognizer = Recognizer(model, LABELS, streams=streams)
  documents = [np.zeros(0, np.float32)] * streams
  for n in (40, 173, 7, 161):
    samples, lengths = noise(streams, n, seed=n), rng.randint(0, n + 1, streams)
    lengths[rng.rand(streams) < 0.4] = 0
    reset = rng.rand(streams) < 0.2
    got = recognizer.push(samples, lengths=lengths, reset=reset)
    for i in np.flatnonzero(lengths):
      before = documents[i][:0] if reset[i] else documents[i]
      documents[i] = np.concatenate([before, samples[i, : lengths[i]]])
  np.testing.assert_allclose(got, reference(model, documents), atol=1e-5)
  for i in range(0, streams, 331):
    alone = Recognizer(model, LABELS)
    expected = alone.push(documents[i][None]) if len(documents[i]) else alone.posteriors()
    np.testing.assert_allclose(got[i : i + 1], expected, atol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_an_idle_stream_keeps_every_bit(padding):
  recognizer = Recognizer(MODELS[padding], LABELS, streams=4)
  recognizer.push(noise(4, 123))
  idle = np.array([0, 2])
  before = jax.tree.map(np.array, take_rows(recognizer.state, idle))
  samples = noise(4, 345, seed=1)
  samples[idle] = np.nan
  reset = np.array([True, False, False, True])
  recognizer.push(samples, lengths=np.array([0, 345, 0, 17]), reset=reset)
  jax.tree.map(np.testing.assert_array_equal, take_rows(recognizer.state, idle), before)
  assert recognizer.heard.tolist() == [123, 468, 123, 17]
  changed = take_rows(recognizer.state, np.array([1, 3]))
  assert not np.isnan(np.concatenate([np.ravel(a) for a in jax.tree.leaves(changed)])).any()


def test_calls_of_any_size_run_two_programs(monkeypatch):
  traced = []

  def counted(name):
    method = getattr(Classifier, name)

    def call(self, *arguments, **options):
      traced.append((name, arguments[0].shape if name == "encode" else None))
      return method(self, *arguments, **options)

    monkeypatch.setattr(Classifier, name, call)

  counted("encode")
  counted("read_out")
  _programs.cache_clear()
  recognizer = Recognizer(MODELS["causal"], LABELS, streams=2)
  for n in (1, 2, 9, 10, 11, 57, 159, 160, 161, 500):
    recognizer.push(noise(2, n))
    recognizer.push((noise(2, n) * 2**15).astype(np.int16), lengths=np.array([n, 0]))
    recognizer.push(noise(2, n).astype(np.float64), reset=np.array([True, False]))
  Recognizer(MODELS["causal"], LABELS, streams=2).push(noise(2, 5))  # of the same model
  assert sorted(name for name, _ in traced) == ["encode", "encode", "read_out"]
  assert {shape for name, shape in traced if name == "encode"} == {(2, 10), (2, 160)}


def test_pieces_are_as_large_as_is_fast():
  def pieces(streams, n):
    return [size for _, size in Recognizer(MODELS["causal"], LABELS, streams=streams)._pieces(n)]

  assert pieces(1, 10) == [10] and pieces(1, 20) == [160] and pieces(1, 161) == [160, 10]
  assert pieces(1000, 150) == [10] * 15 and pieces(1000, 330) == [10] * 33
  assert pieces(64, 100) == [10] * 10 and pieces(64, 150) == [160]


def test_integers_are_heard_as_what_they_stand_for():
  integers = np.random.RandomState(0).randint(-(2**15), 2**15, (1, 200)).astype(np.int16)
  got = Recognizer(MODELS["causal"], LABELS).push(integers)
  for dtype in (np.float32, np.float64, jnp.float32):
    recognizer = Recognizer(MODELS["causal"], LABELS)
    np.testing.assert_array_equal(got, recognizer.push(integers.astype(dtype) / 2**15))


def test_before_a_frame_is_whole_the_answer_is_of_nothing():
  model = MODELS["same"]
  recognizer = Recognizer(model, LABELS, streams=STREAMS)
  nothing = jax.nn.softmax(model.head.bias[...])
  np.testing.assert_allclose(recognizer.posteriors()[0], nothing, atol=1e-6)
  got = recognizer.push(noise(4, 25), lengths=np.array([24, 25, 0, 0]))
  np.testing.assert_allclose(got[0], nothing, atol=1e-6)
  assert np.abs(got[1] - nothing).max() > 1e-3


def test_reset_forgets():
  recognizer = Recognizer(MODELS["causal"], LABELS, streams=STREAMS)
  first = jax.tree.map(np.array, recognizer.state)
  recognizer.push(noise(4, 77))
  kept = jax.tree.map(np.array, take_rows(recognizer.state, np.array([1])))
  recognizer.reset(np.array([True, False, True, False]))
  jax.tree.map(np.testing.assert_array_equal, take_rows(recognizer.state, np.array([1])), kept)
  ends = np.array([0, 2])
  jax.tree.map(
    np.testing.assert_array_equal, take_rows(recognizer.state, ends), take_rows(first, ends)
  )
  assert recognizer.heard.tolist() == [0, 77, 0, 77]


def test_a_stream_takes_the_same_memory_however_many_there_are():
  sizes = {Recognizer(MODELS["same"], LABELS, streams=n).state_bytes for n in (1, 4)}
  assert len(sizes) == 1 and 0 < sizes.pop() < 4000


@pytest.mark.parametrize(
  ("samples", "options", "message"),
  [
    (np.zeros((4, 0)), {}, r"samples have shape \[4, 0\], expected \[4, n\] with n > 0"),
    (np.zeros((3, 5)), {}, r"samples have shape \[3, 5\], expected \[4, n\]"),
    (np.zeros(5), {}, r"samples have shape \[5\]"),
    (np.zeros((4, 5), np.int32), {}, "samples are int32, expected int16, or floats"),
    (np.zeros((4, 5), bool), {}, "samples are bool, expected int16"),
    (np.full((4, 5), np.nan), {}, "samples reach nan"),
    (np.full((4, 5), 300.0), {}, r"samples reach 300.0, expected int16, or in \[-1, 1\]"),
    (np.zeros((4, 5)), {"lengths": np.array([1, 6, 0, 0])}, "lengths have 6, expected 0 to 5"),
    (np.zeros((4, 5)), {"lengths": np.array([-1, 5, 0, 0])}, "lengths have -1, expected 0 to 5"),
    (
      np.zeros((4, 5)),
      {"lengths": np.ones(4)},
      r"lengths are float64\[4\], expected int",
    ),
    (np.zeros((4, 5)), {"lengths": 5}, r"lengths are int64\[\], expected integers \[4\]"),
    (np.zeros((4, 5)), {"reset": np.zeros(4)}, r"reset is float64\[4\], expected bool\[4\]"),
    (np.zeros((4, 5)), {"reset": np.zeros((4, 5), bool)}, r"reset is bool\[4, 5\]"),
  ],
)
def test_what_cannot_be_heard_is_not(samples, options, message):
  recognizer = Recognizer(MODELS["causal"], LABELS, streams=STREAMS)
  recognizer.push(noise(4, 50))
  before = jax.tree.map(np.array, recognizer.state)
  with pytest.raises(ValueError, match=message):
    recognizer.push(samples, **options)
  jax.tree.map(np.testing.assert_array_equal, recognizer.state, before)


def test_models_that_cannot_stream():
  frames = make_model(front_end=None)
  language = {"architecture": "retnet", "vocab_size": 8, "d_model": 8, "num_layers": 1}
  language |= {"num_heads": 2, "value_dim": 8, "ffn_dim": 8}
  with pytest.raises(ValueError, match="LMUFormer takes frames, not samples"):
    Recognizer(frames, LABELS)
  with pytest.raises(ValueError, match="RetNet is no classifier of audio"):
    Recognizer(build(language, rngs=nnx.Rngs(0)), LABELS)
  seen_whole = make_model()
  seen_whole.causal = False
  with pytest.raises(ValueError, match="LMUFormer sees whole sequences and cannot stream"):
    Recognizer(seen_whole, LABELS)
  with pytest.raises(ValueError, match="labels are 2, expected the names of 3 classes"):
    Recognizer(MODELS["causal"], LABELS[:2])
  with pytest.raises(ValueError, match="expected streams >= 1, got 0"):
    Recognizer(MODELS["causal"], LABELS, streams=0)


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_oldest_window_answers(padding):
  model, samples = MODELS[padding], noise(1600)
  spotter = Spotter(model, LABELS, window=0.4, rows=4, every=0.03)
  answers, at = [], 0
  for n in (1, 29, 30, 200, 333, 407, 600):
    answers += spotter.answers(samples[at : at + n])
    at += n
  ends = [round(1000 * answer.time) for answer in answers]
  assert at == len(samples) and ends == list(range(30, at + 1, 30))
  starts = [min(s for s in range(0, at, 100) if end - s <= 400) for end in ends]
  expected = reference(model, [samples[s:e] for s, e in zip(starts, ends, strict=True)])
  np.testing.assert_allclose(np.stack([a.posteriors for a in answers]), expected, atol=1e-5)
  np.testing.assert_allclose(
    spotter.posteriors(), reference(model, [samples[1200:1600]])[0], atol=1e-5
  )


def said(monkeypatch, certain, seconds=6.0, **options):
  """The decisions if posteriors are 0.9 for a label from one time to another, `(label, a, b)`."""
  spotter = Spotter(MODELS["causal"], LABELS, **options)
  monkeypatch.setattr(spotter.recognizer, "hear", lambda *_, **__: None)

  def posteriors():
    time, told = spotter.heard / 1000, np.full(3, 0.34, np.float32)
    for label, begin, end in certain:
      if begin <= time < end:
        told[:] = 0.05
        told[LABELS.index(label)] = 0.9
    return told

  monkeypatch.setattr(spotter, "posteriors", posteriors)
  decisions = spotter.push(np.zeros(round(1000 * seconds), np.float32))
  assert all(d.posterior == pytest.approx(0.9) for d in decisions)
  return [(d.label, pytest.approx(d.time)) for d in decisions]


def test_decisions(monkeypatch):
  def decided(*certain, **options):
    return said(monkeypatch, certain, **options)

  # When it was certain for as long as a row answers.
  assert decided(("yes", 1.0, 1.6)) == [("yes", 1.25)]
  assert decided(("yes", 0.99, 1.6), every=0.1) == [("yes", 1.3)]
  # What one row alone says is not believed.
  assert decided(("yes", 1.0, 1.25)) == []
  assert decided(("yes", 1.0, 1.2), ("yes", 1.25, 1.45)) == []
  assert decided(("yes", 1.0, 1.2), ("no", 1.2, 1.4), ("yes", 1.4, 1.6)) == []
  assert decided(("yes", 1.0, 1.25), hold=0.2) == [("yes", 1.2)]
  assert decided(("yes", 1.0, 1.01), hold=0) == [("yes", 1.0)]
  # Once for a word, though it may dip, but again when it is said again.
  assert decided(("yes", 1.0, 1.4), ("yes", 1.5, 2.0)) == [("yes", 1.25)]
  assert decided(("yes", 1.0, 1.6), ("yes", 2.0, 2.6)) == [("yes", 1.25), ("yes", 2.25)]
  assert decided(("yes", 1.0, 3.9)) == [("yes", 1.25), ("yes", 2.25), ("yes", 3.25)]
  assert decided(("yes", 1.0, 2.9), window=0.5) == [("yes", t) for t in (1.15, 1.65, 2.15, 2.65)]
  # Others are other words.
  assert decided(("yes", 1.0, 1.3), ("no", 1.3, 1.6)) == [("yes", 1.25), ("no", 1.55)]
  # Nothing is no word, unless it is asked for.
  assert decided(("_silence_", 1.0, 1.6)) == []
  assert decided(("_silence_", 1.0, 1.6), ignored=()) == [("_silence_", 1.25)]
  assert decided(("yes", 1.0, 1.6), ("no", 2.0, 2.6), ignored=["yes"]) == [("no", 2.25)]
  # Certain enough.
  assert decided(("yes", 1.0, 1.6), threshold=float(np.float32(0.9))) == [("yes", 1.25)]
  assert decided(("yes", 1.0, 1.6), threshold=0.91) == []


@given(data=st.data())
def test_decisions_do_not_depend_on_the_pieces(data):
  model, samples = MODELS["causal"], noise(900)
  options = {"window": 0.4, "every": 0.02, "threshold": 0.34, "hold": 0.02}
  expected = Spotter(model, LABELS, **options).push(samples)
  assert len(expected) > 1
  spotter = Spotter(model, LABELS, **options)
  cuts = sorted(data.draw(st.sets(st.integers(1, 899), max_size=5)))
  got = [d for piece in np.split(samples, cuts) for d in spotter.push(piece)]
  assert [d[:2] for d in got] == [d[:2] for d in expected]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"threshold": 0.0}, "threshold is 0.0, expected more than 0 and at most 1"),
    ({"threshold": 1.5}, "threshold is 1.5"),
    ({"window": 0.05}, "window is 0.05 s, expected at least 0.1 s"),
    ({"window": float("nan")}, "window is nan s"),
    ({"rows": 1}, "rows is 1, expected at least 2"),
    ({"every": 0.0}, "every is 0.0 s, expected at least a sample, 0.001 s"),
    ({"hold": -1.0}, "hold is -1.0 s, expected at least 0"),
    ({"ignored": ["maybe", "no"]}, "ignored has maybe, expected some of yes, no, _silence_"),
  ],
)
def test_a_spotter_that_cannot_be(options, message):
  with pytest.raises(ValueError, match=message):
    Spotter(MODELS["causal"], LABELS, **options)


def test_a_spotter_hears_one_stream():
  for shape in ((1, 5), (0,)):
    with pytest.raises(ValueError, match=r"expected \[n\] with n > 0"):
      Spotter(MODELS["causal"], LABELS).answers(np.zeros(shape))


def test_a_document_has_to_fit_into_a_cache():
  """Of an attention's keys: it is told, and nothing is heard."""
  sizes = {"in_features": 8, "num_classes": 3, "d_model": 8, "num_layers": 1, "num_heads": 2}
  model = Encoder(
    front_end="fbank", **sizes, ffn_dim=8, pattern="attention(max_len=4)", rngs=nnx.Rngs(0)
  )
  labels = ("a", "b", "c")
  recognizer = Recognizer(model, labels, streams=2)
  before = recognizer.push(noise(2, 1000))
  with pytest.raises(
    ValueError, match="heard 6 frames of its document, expected at most 4, max_len"
  ):
    recognizer.push(noise(2, 300), reset=np.array([True, False]))
  np.testing.assert_array_equal(recognizer.posteriors(), before)
  assert np.isfinite(recognizer.push(noise(2, 300), reset=np.array([True, True]))).all()
  with pytest.raises(ValueError, match="heard 98 frames of its document, expected at most 4"):
    Spotter(model, labels)
