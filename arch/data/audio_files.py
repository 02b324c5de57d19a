"""Recordings in WAV and FLAC files, as 16-bit samples of one channel at one rate."""

import io
import math
import wave
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import scipy.signal

ENDINGS = (".wav", ".flac")
_RATES = range(1000, 400_000)  # Hz; elsewhere a header is damaged, and resampling would not end


class Audio(NamedTuple):
  """A recording, and how it was before, such as "8000 Hz" or "2 channels"."""

  samples: np.ndarray  # int16[n]
  converted: tuple[str, ...]


class BadAudioError(ValueError):
  """A file that is no recording.

  Attributes:
    kind: what is wrong, in words that many files share.
  """

  def __init__(self, message: str, kind: str):
    super().__init__(message, kind)
    self.kind = kind

  def __str__(self) -> str:
    return self.args[0]


class _Frames(NamedTuple):
  values: np.ndarray  # number[n, channels]
  scale: float  # what to multiply them by for those of 16 bits
  bits: int
  rate: int  # Hz


def read_audio(
  file: bytes | str | Path, *, sample_rate: int = 16000, name: str | None = None
) -> Audio:
  """The recording in a WAV file (PCM of 8, 16, 24 or 32 bits) or a FLAC file.

  Which of them it is, is read from its first bytes, whatever its name. Channels are averaged, and
  another rate is resampled.

  Args:
    file: its path or contents.
    sample_rate: samples a second of what is returned.
    name: of the file, for messages; default its path.

  Raises:
    BadAudioError: if the file cannot be read, is damaged, empty or of another kind.
    ValueError: if it is FLAC and the package soundfile is not there.
  """
  if name is None:
    name = "the recording" if isinstance(file, bytes) else str(file)
  if not isinstance(file, bytes):
    try:
      file = Path(file).read_bytes()
    except OSError as error:
      reason = error.strerror or error
      raise BadAudioError(f"{name} cannot be read: {reason}", "unreadable") from error
  if not file:
    raise BadAudioError(f"{name} is an empty file", "empty")
  if file[:4] == b"RIFF":
    frames = _read_wav(file, name)
  elif file[:4] == b"fLaC":
    frames = _read_flac(file, name)
  else:
    start = file[:4].hex()
    raise BadAudioError(f"{name} is neither WAV nor FLAC: it begins with {start}", "no WAV or FLAC")
  if frames.rate not in _RATES:
    raise BadAudioError(
      f"{name} is of {frames.rate} Hz, expected {_RATES.start} to {_RATES.stop - 1}", "damaged"
    )
  if not len(frames.values):
    raise BadAudioError(f"{name} has no samples", "empty")
  return _converted(frames, sample_rate)


def soundfile_module() -> ModuleType:
  """The package that reads FLAC, which a machine without FLAC files does not need."""
  try:
    import soundfile
  except (ImportError, OSError) as error:  # OSError: its C library is missing
    raise ValueError(
      f"FLAC files need the package soundfile: `pip install soundfile` ({error})"
    ) from error
  return soundfile


def _converted(frames: _Frames, sample_rate: int) -> Audio:
  values, scale, bits, rate = frames
  channels = values.shape[1]
  converted = []
  if bits != 16:
    converted.append(f"{bits} bits")
  if channels > 1:
    converted.append(f"{channels} channels")
  if rate != sample_rate:
    converted.append(f"{rate} Hz")
  if not converted:
    return Audio(values[:, 0].astype(np.int16), ())
  mono = values.mean(axis=1, dtype=np.float64) * scale
  if rate != sample_rate:
    common = math.gcd(rate, sample_rate)
    mono = scipy.signal.resample_poly(mono, sample_rate // common, rate // common)
  limits = np.iinfo(np.int16)
  samples = np.rint(mono).clip(limits.min, limits.max).astype(np.int16)
  return Audio(samples, tuple(converted))


def _read_wav(data: bytes, name: str) -> _Frames:
  try:
    with wave.open(io.BytesIO(data)) as file:
      channels, width, rate, count = file.getparams()[:4]
      # A damaged header may tell of more than there is, but no more than that is read.
      content = file.readframes(count)
  except wave.Error as error:
    if str(error).startswith("unknown format"):
      raise BadAudioError(
        f"{name} is WAV of an {error}, expected PCM of integers", "WAV other than PCM"
      ) from error
    raise BadAudioError(f"{name} is damaged: {error}", "damaged") from error
  except (EOFError, RuntimeError) as error:  # RuntimeError: a chunk that ends outside the file
    raise BadAudioError(f"{name} is damaged: it ends in its header", "damaged") from error
  bits = 8 * width
  if width not in (1, 2, 3, 4):
    raise BadAudioError(f"{name} is of {bits} bits, expected 8, 16, 24 or 32", "WAV other than PCM")
  expected = count * channels * width
  if len(content) < expected:
    raise BadAudioError(
      f"{name} is cut short: it has {len(content)} of {expected} bytes", "damaged"
    )
  match width:
    case 1:
      values = np.frombuffer(content, np.uint8).astype(np.int16) - 128
    case 3:  # NumPy has no such type: the upper bytes of four
      wide = np.zeros((len(content) // 3, 4), np.uint8)
      wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
      values = wide.view("<i4")[:, 0]
    case _:
      values = np.frombuffer(content, f"<i{width}")
  scale = {1: 2.0**8, 2: 1.0}.get(width, 2.0**-16)
  return _Frames(values.reshape(-1, channels), scale, bits, rate)


def _read_flac(data: bytes, name: str) -> _Frames:
  soundfile = soundfile_module()
  blocks = []
  try:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      bits = {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24}.get(file.subtype, 32)
      # In blocks, for of a damaged header all that it tells of would be allocated.
      while len(block := file.read(2**16, dtype="int32", always_2d=True)):
        blocks.append(block)
      rate, count, channels = file.samplerate, file.frames, file.channels
  except (soundfile.SoundFileError, RuntimeError, OverflowError) as error:
    reason = str(getattr(error, "error_string", error)).rstrip(".")
    raise BadAudioError(f"{name} is damaged: {reason}", "damaged") from error
  values = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.int32)
  if len(values) < count:
    raise BadAudioError(f"{name} is cut short: it has {len(values)} of {count} samples", "damaged")
  if bits == 16:  # the upper half, exactly
    return _Frames(values >> 16, 1.0, bits, rate)
  return _Frames(values, 2.0**-16, bits, rate)
