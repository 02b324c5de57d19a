"""Recordings of every kind that is read, and the reason where one is not."""

import io
import struct
import sys
import wave

import numpy as np
import pytest

from triform.arch.data.audio_files import BadAudioError, read_audio

SAMPLES = np.random.RandomState(0).randint(-32768, 32768, 400).astype(np.int16)


def wav(frames: bytes, *, width=2, channels=1, rate=16000) -> bytes:
  file = io.BytesIO()
  with wave.open(file, "wb") as writer:
    writer.setparams((channels, width, rate, 0, "NONE", ""))
    writer.writeframes(frames)
  return file.getvalue()


def flac(samples: np.ndarray, *, rate=16000, subtype="PCM_16") -> bytes:
  soundfile = pytest.importorskip("soundfile")
  file = io.BytesIO()
  soundfile.write(file, samples, rate, format="FLAC", subtype=subtype)
  return file.getvalue()


def tone(rate: int, seconds=0.5) -> np.ndarray:
  return np.rint(9000 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate))


@pytest.mark.parametrize("write", [lambda s: wav(s.tobytes()), flac])
def test_16_bits_are_read_exactly(write, tmp_path):
  data = write(SAMPLES)
  (tmp_path / "clip").write_bytes(data)
  for file in (data, tmp_path / "clip", str(tmp_path / "clip")):
    audio = read_audio(file)
    assert audio.samples.dtype == np.int16 and audio.converted == ()
    np.testing.assert_array_equal(audio.samples, SAMPLES)


def test_other_widths_keep_their_upper_bits():
  wide = SAMPLES.astype(np.int64)
  three = (wide * 256).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
  four = (wide * 65536).astype("<i4").tobytes()
  for width, frames in ((3, three), (4, four)):
    audio = read_audio(wav(frames, width=width))
    np.testing.assert_array_equal(audio.samples, SAMPLES)
    assert audio.converted == (f"{8 * width} bits",)
  audio = read_audio(wav(bytes([0, 127, 128, 255]), width=1))
  assert audio.samples.tolist() == [-32768, -256, 0, 127 * 256] and audio.converted == ("8 bits",)


def test_rounding_does_not_wrap_around():
  largest = np.array([2**31 - 1, -(2**31)], "<i4").tobytes()
  assert read_audio(wav(largest, width=4)).samples.tolist() == [32767, -32768]


def test_24_bit_flac():
  audio = read_audio(flac(SAMPLES.astype(np.int32) << 16, subtype="PCM_24"))
  np.testing.assert_array_equal(audio.samples, SAMPLES)
  assert audio.converted == ("24 bits",)


@pytest.mark.parametrize("write", [lambda s: wav(s.tobytes(), channels=2), flac])
def test_channels_are_averaged(write):
  pairs = np.array([[100, 300], [-5, 5], [32767, 32767], [-32768, -32768]], np.int16)
  audio = read_audio(write(pairs))
  assert audio.samples.tolist() == [200, 0, 32767, -32768] and audio.converted == ("2 channels",)


@pytest.mark.parametrize("rate", [8000, 44100, 48000, 11025])
def test_another_rate_is_resampled(rate):
  audio = read_audio(wav(tone(rate).astype("<i2").tobytes(), rate=rate))
  assert audio.converted == (f"{rate} Hz",) and abs(len(audio.samples) - 8000) <= 1
  inner = slice(500, 7500)
  error = audio.samples[inner] - tone(16000)[: len(audio.samples)][inner]
  assert np.abs(error).max() < 90  # a hundredth


def test_the_wanted_rate_may_be_another():
  audio = read_audio(wav(SAMPLES.tobytes(), rate=8000), sample_rate=8000)
  np.testing.assert_array_equal(audio.samples, SAMPLES)
  assert read_audio(wav(SAMPLES.tobytes()), sample_rate=8000).converted == ("16000 Hz",)


GOOD = wav(SAMPLES.tobytes())


def patched(offset: int, layout: str, value: int) -> bytes:
  return GOOD[:offset] + struct.pack(layout, value) + GOOD[offset + struct.calcsize(layout) :]


@pytest.mark.parametrize(
  ("data", "kind", "message"),
  [
    (b"", "empty", "x.wav is an empty file"),
    (wav(b""), "empty", "x.wav has no samples"),
    (GOOD[:-1], "damaged", "x.wav is cut short: it has 799 of 800 bytes"),
    (GOOD[:30], "damaged", "x.wav is damaged: it ends in its header"),
    (GOOD[:36], "damaged", "x.wav is damaged: "),
    (b"ID3\x04 and so on", "no WAV or FLAC", "x.wav is neither WAV nor FLAC: .* 49443304"),
    (patched(20, "<H", 3), "WAV other than PCM", "an unknown format: 3, expected PCM"),
    (patched(34, "<H", 64), "WAV other than PCM", "is of 64 bits, expected 8, 16, 24 or 32"),
    (patched(24, "<L", 0), "damaged", "x.wav is of 0 Hz, expected 1000 to 399999"),
    (patched(24, "<L", 2**31), "damaged", "x.wav is of 2147483648 Hz"),
    (patched(40, "<L", 2**31), "damaged", "x.wav is cut short: it has 800 of 2147483648 bytes"),
  ],
)
def test_a_bad_file_is_named_with_the_reason(data, kind, message):
  with pytest.raises(BadAudioError, match=message) as caught:
    read_audio(data, name="x.wav")
  assert caught.value.kind == kind and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(BadAudioError, match=r"nowhere.wav cannot be read: No such file or directory"):
    read_audio(tmp_path / "nowhere.wav")


def test_damaged_flac_is_named():
  data = flac(SAMPLES)
  for bad in (data[:-200], data[:40], data[:60], b"fLaC", data[:50] + bytes(len(data) - 50)):
    with pytest.raises(BadAudioError, match=r"x.flac is (damaged|cut short): ") as caught:
      read_audio(bad, name="x.flac")
    assert "BytesIO" not in str(caught.value)
  with pytest.raises(BadAudioError):
    read_audio(flac(SAMPLES[:0]), name="x.flac")


def test_flac_without_soundfile_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "soundfile", None)
  with pytest.raises(ValueError, match=r"FLAC files need .*`pip install soundfile`") as caught:
    read_audio(b"fLaC and so on")
  assert not isinstance(caught.value, BadAudioError)  # the file is not at fault


@pytest.mark.parametrize("write", [lambda s: wav(s.tobytes()), flac])
def test_no_damage_raises_anything_else(write):
  data, random = write(SAMPLES), np.random.RandomState(1)
  for _ in range(300):
    damaged = bytearray(data)
    for place in random.randint(4, 60, 2):
      damaged[place] = random.randint(256)
    try:
      audio = read_audio(bytes(damaged[: random.randint(4, len(data) + 1)]))
    except BadAudioError:
      continue
    assert audio.samples.dtype == np.int16 and audio.samples.ndim == 1 and len(audio.samples)
