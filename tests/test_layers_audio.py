"""Log-mels and cepstra against the published numbers, and frames from samples as they come."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st
from published import DATA

from triform.arch.interface import put_rows, take_rows
from triform.arch.layers.audio import FLOOR, Analysis, FrontEnd, fbank, make_front_end, mfcc

FIXTURE = np.load(DATA / "fbank.npz")
# Largest and 99.9 % of the distances of float32 from float64; what is nearly empty cancels.
BOUNDS = {"ast": (1e-3, 3e-4), "mel40": (2.5e-4, 2.5e-4), "mel40_unit": (2.5e-4, 2.5e-4)}


def published(case):
  meta = json.loads(str(FIXTURE[f"{case}/meta"]))
  samples = FIXTURE[f"{case}/in/samples"][None] / meta["divide_samples_by"]
  options = {"num_mel_bins": meta["num_mel_bins"], "window_type": meta["window"]}
  return samples, options, FIXTURE[f"{case}/out"]


@pytest.mark.parametrize("case", BOUNDS)
def test_the_published_log_mels(case):
  samples, options, expected = published(case)
  errors = np.abs(np.asarray(fbank(samples.astype(np.float32), **options))[0] - expected)
  assert errors.shape == expected.shape
  most, nearly_all = BOUNDS[case]
  assert errors.max() <= most and np.quantile(errors, 0.999) <= nearly_all
  with jax.enable_x64(True):
    exact = fbank(samples, **options)
  assert exact.dtype == np.float64
  # The fixture was rounded to float32: half a unit in the last place of 16.
  np.testing.assert_allclose(exact[0], expected, rtol=0, atol=2**-20)


def test_the_front_end_gives_asts_features():
  samples, _, _ = published("ast")
  with pytest.warns(UserWarning, match=r"1 of 128 mel filters \(3\) have no bin"):
    front_end = FrontEnd(Analysis())
  frames, real, _ = front_end(FIXTURE["ast/in/samples"][None])
  assert real.all()
  expected = FIXTURE["ast/features"][:98].copy()
  assert np.allclose(expected[:, 3], expected[0, 3])  # the filter that sees nothing
  expected[:, 3] = 0
  np.testing.assert_allclose(frames[0], expected, rtol=0, atol=1e-3 / front_end.scale)
  np.testing.assert_array_equal(frames, front_end(samples.astype(np.float32))[0])


def test_cepstra_are_a_cosine_transform_of_log_mels():
  samples, _, _ = published("mel40")
  with jax.enable_x64(True):
    mels = np.asarray(fbank(samples, num_mel_bins=23, window_type="povey"))
    cepstra = mfcc(samples, num_mel_bins=23, window_type="povey")
    plain = mfcc(samples, num_ceps=23, num_mel_bins=23, window_type="povey", cepstral_lifter=0.0)
  expected = scipy.fft.dct(mels, norm="ortho")
  np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-10)
  lifter = 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
  np.testing.assert_allclose(cepstra, expected[..., :13] * lifter, rtol=0, atol=1e-10)


def test_filters_without_a_bin_are_told_and_at_the_floor():
  assert Analysis(num_mel_bins=40).empty_filters() == ()
  assert Analysis(num_mel_bins=128).empty_filters() == (3,)
  mels = fbank(np.ones((1, 400), np.float32) * np.sin(np.arange(400, dtype=np.float32))[None])
  np.testing.assert_allclose(mels[..., 3], np.log(FLOOR), rtol=1e-6)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    FrontEnd(Analysis(num_mel_bins=40))


def test_silence_is_at_the_floor_and_short_audio_has_no_frame():
  np.testing.assert_allclose(fbank(np.zeros((2, 720), np.float32)), np.log(FLOOR), rtol=1e-6)
  assert fbank(np.zeros((2, 399), np.float32)).shape == (2, 0, 128)
  assert fbank(np.zeros((2, 400), np.float32)).shape == (2, 1, 128)


def test_gradients_are_those_of_differences():
  with jax.enable_x64(True):
    x = np.random.default_rng(0).standard_normal((1, 500))
    direction = np.random.default_rng(1).standard_normal(x.shape)

    def f(step):
      return fbank(x + step * direction, num_mel_bins=20).sum()

    slope = jax.grad(f)(0.0)
    difference = (f(1e-6) - f(-1e-6)) / 2e-6
  np.testing.assert_allclose(slope, difference, rtol=1e-6)


SMALL = Analysis(sample_frequency=1000, num_mel_bins=6, frame_length=25, frame_shift=10)
FRONT_END = FrontEnd(SMALL)
CALL = jax.jit(lambda x, state, mask, reset: FRONT_END(x, state, mask=mask, reset=reset))


def pieces(x, cuts, state=None):
  """The real frames of every row, and the state, of samples that come in pieces."""
  state = FRONT_END.init_state(len(x)) if state is None else state
  frames = [[] for _ in x]
  for piece in np.split(x, cuts, axis=1):
    if piece.shape[1]:
      y, real, state = CALL(piece, state, np.ones(piece.shape, bool), np.zeros(piece.shape, bool))
      for row, (values, there) in enumerate(zip(np.asarray(y), np.asarray(real), strict=True)):
        frames[row].append(values[there])
  return [np.concatenate(row) for row in frames], state


@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 10))
def test_frames_have_the_same_bits_however_samples_come(cuts, seed):
  x = np.random.default_rng(seed).standard_normal((2, 300)).astype(np.float32)
  whole, real, after = jax.jit(lambda x: FRONT_END(x))(x)
  assert whole.shape == (2, 28, 6) and real.all()
  frames, state = pieces(x, sorted(cuts))
  for row in range(2):
    np.testing.assert_array_equal(frames[row], whole[row])
  np.testing.assert_array_equal(state.tail, x[:, -24:])
  for a, b in zip(state, after, strict=True):
    np.testing.assert_array_equal(a, b)


def test_16_khz_frames_have_the_same_bits_too():
  """Of a size that real models have, by samples one at a time, by hops and by seconds."""
  front_end = FrontEnd(Analysis(num_mel_bins=40))
  x = FIXTURE["ast/in/samples"][None]
  call = jax.jit(lambda x, state: front_end(x, state))
  whole = np.asarray(jax.jit(lambda x: front_end(x))(x)[0])[0]
  for sizes in ([160], [1, 399, 7], [1000, 3], [16000]):
    state, frames, at, i = front_end.init_state(1), [], 0, 0
    while at < 8000:
      y, real, state = call(x[:, at : at + sizes[i % len(sizes)]], state)
      frames.append(np.asarray(y)[0][np.asarray(real)[0]])
      at, i = at + sizes[i % len(sizes)], i + 1
    frames = np.concatenate(frames)
    np.testing.assert_array_equal(frames, whole[: len(frames)])
    assert len(frames) >= 47


@given(st.integers(0, 10))
def test_padding_is_not_heard_wherever_it_stands(seed):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((2, 120)).astype(np.float32)
  mask = rng.random((2, 120)) < 0.7
  filled = np.where(mask, x, np.nan)
  y, real, state = CALL(filled, FRONT_END.init_state(2), mask, np.zeros_like(mask))
  for row in range(2):
    alone, there, own = FRONT_END(x[row : row + 1][:, mask[row]])
    np.testing.assert_array_equal(y[row][real[row]], alone[0][there[0]])
    for a, b in zip(take_rows(state, np.array([row])), own, strict=True):
      np.testing.assert_array_equal(a, b)
  still, nothing, same = CALL(filled, state, np.zeros_like(mask), np.ones_like(mask))
  assert np.isfinite(still).all() and not nothing.any()
  for a, b in zip(same, state, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_reset_begins_a_document_in_its_row_alone():
  x = np.random.default_rng(0).standard_normal((2, 90)).astype(np.float32)
  _, before = pieces(x[:, ::-1], [])
  reset = np.zeros((2, 90), bool)
  reset[0, [3, 40]] = True
  y, real, state = CALL(x, before, np.ones_like(reset), reset)
  alone, there, own = FRONT_END(x[:1, 40:])
  np.testing.assert_array_equal(y[0][real[0]], alone[0][there[0]])
  _, _, other = CALL(x, before, np.ones_like(reset), np.zeros_like(reset))
  expected = put_rows(other, np.array([0]), own)
  for a, b in zip(state, expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_front_end_by_its_name():
  front_end = make_front_end("mfcc(num_mel_bins=30, mean=0.0, scale=2.0)", 13, jnp.bfloat16)
  assert front_end.analysis.num_features == 13 and front_end.dtype == jnp.float32
  x = FIXTURE["ast/in/samples"][None] / np.float32(2**15)
  np.testing.assert_allclose(front_end(x)[0], mfcc(x, num_mel_bins=30) / 2, rtol=1e-6)
  assert make_front_end("fbank", 40, jnp.float32).analysis == Analysis(num_mel_bins=40)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("fbnk", "front_end 'fbnk' has the unknown name 'fbnk'; did you mean 'fbank'"),
    ("fbank(", "front_end is 'fbank\\(', expected text such as fbank or mfcc"),
    ("fbank, fbank", "expected one call"),
    ("fbank(num_mel_bins=40)", "num_mel_bins"),
    ("fbank(bins=40)", "bins"),
    ("fbank(num_ceps=13)", "num_ceps"),
    ("fbank(scale='a')", "front_end \"fbank\\(scale='a'\\)\""),
    ("", "front_end is '', expected text such as fbank"),
    ("fbank(scale=0)", "scale is 0, expected a positive number"),
    ("fbank(frame_shift=30.0)", "frame_shift is 30.0 ms, expected at most frame_length, 25.0 ms"),
    ("fbank(frame_length=0.1)", "frame_length is 0.1 ms, 1 samples at 16000.0 Hz"),
    ("fbank(low_freq=9000.0)", "low_freq is 9000.0 and high_freq 0.0"),
    ("fbank(window_type='hann')", "window_type is 'hann', expected one of hanning"),
    ("fbank(sample_frequency=0)", "sample_frequency is 0, expected a number of hertz"),
  ],
)
def test_what_cannot_be_is_told(text, message):
  with pytest.raises(ValueError, match=message):
    make_front_end(text, 40, jnp.float32)


def test_wrong_numbers_and_shapes_are_told():
  with pytest.raises(ValueError, match=r"samples have shape \[400\], expected \[batch, samples\]"):
    fbank(np.zeros(400, np.float32))
  with pytest.raises(ValueError, match=r"x has shape \[1, 400, 1\], expected samples"):
    FRONT_END(np.zeros((1, 400, 1), np.float32))
  with pytest.raises(ValueError, match="x is int32, expected int16, or floats"):
    FRONT_END(np.zeros((1, 400), np.int32))
  with pytest.raises(ValueError, match="num_ceps is 24, expected 1 to num_mel_bins=23"):
    mfcc(np.zeros((1, 400), np.float32), num_ceps=24, num_mel_bins=23)
  with pytest.raises(ValueError, match="num_mel_bins is 0, expected at least 1"):
    fbank(np.zeros((1, 400), np.float32), num_mel_bins=0)
