"""The files of spoken words: folders, archives, and what is bad, converted or not used."""

import gzip
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from spoken_words import (
  RATE,
  SPEAKER,
  assert_same,
  contents,
  opener,
  pack,
  rows,
  write_clip,
  write_noise,
  write_twelve,
  write_words,
)

from triform.arch.data.speech import WORDS


@pytest.fixture
def opened(tmp_path):
  return opener(tmp_path)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_an_archive_is_read_as_the_folder(tmp_path, opened, ending):
  folder = write_twelve(tmp_path / "data")
  (folder / "testing_list.txt").write_text(f"bed/{SPEAKER['train']}_nohash_0.wav\n")
  (folder / "validation_list.txt").write_text(f"yes/{SPEAKER['train']}_nohash_1.wav\n")
  archive = pack(folder, tmp_path / f"data{ending}")
  plain, packed = opened(folder), opened(archive)
  assert plain.labels == packed.labels and len(plain.labels) == 13
  for split in ("train", "validation", "test"):
    assert_same(rows(plain, split), rows(packed, split))
  assert contents(packed, "test")[0][0] == "bed" and len(packed.examples("test")) == 1


def write_bad(root: Path) -> None:
  write_words(root, ("no", "yes"), {"train": 2, "validation": 1, "test": 1})
  bad = root / "maybe"
  bad.mkdir()
  (bad / "a_nohash_0.wav").write_bytes(b"")
  write_clip(bad / "b_nohash_0.wav", [])
  (bad / "c_nohash_0.wav").write_bytes(b"no audio at all")
  (bad / "d_nohash_0.wav").write_bytes((root / "yes/b87bdb22_nohash_0.wav").read_bytes()[:-8])
  write_clip(root / "_background_noise_" / "short.wav", np.ones(5 * RATE))


def test_bad_files_stop_the_run_unless_told_otherwise(tmp_path, opened, capsys):
  write_bad(tmp_path / "data")
  message = (
    r"data/maybe/.*_nohash_0.wav .*; files that cannot be used: 5, each with its reason in "
    r"(.*/files.txt); data.on_bad=skip goes on"
  )
  for _ in range(2):  # prepared or not
    with pytest.raises(ValueError, match=message) as caught:
      opened()
  assert "\n" not in str(caught.value)
  each = Path(re.search(message, str(caught.value))[1]).read_text().splitlines()
  bad = sorted(path for path in (tmp_path / "data").rglob("*.wav") if path.parent.name not in WORDS)
  assert sorted(re.match("left out as [^:]+: ([^ ]+) ", line)[1] for line in each) == [
    path.relative_to(tmp_path / "data").as_posix() for path in bad
  ]
  capsys.readouterr()
  data = opened(on_bad="skip")
  assert data.labels == ("no", "yes") and len(data.examples("train")) == 4
  assert "noise" not in data.examples("train")[0]
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 5 and said.pop().endswith("1.1.0/files.txt")
  for kind, count, example in (
    ("empty", 2, "maybe/a_nohash_0.wav is an empty file|maybe/b_nohash_0.wav has no samples"),
    ("no WAV or FLAC", 1, "maybe/c_nohash_0.wav is neither WAV nor FLAC"),
    ("damaged", 1, "maybe/d_nohash_0.wav is cut short: it has 1992 of 2000 bytes"),
    ("too short", 1, "_background_noise_/short.wav has 5000 samples, expected at least 10000"),
  ):
    pattern = rf"data: files left out as {kind}: {count}, such as ({example})"
    assert sum(bool(re.search(pattern, line)) for line in said) == 1, (kind, said)


def test_other_kinds_are_converted_and_counted(tmp_path, opened, capsys):
  folder = tmp_path / "data"
  speaker = SPEAKER["train"]
  write_clip(folder / "slow" / f"{speaker}_nohash_0.wav", np.full(4000, 100), rate=8000)
  write_clip(folder / "slow" / f"{speaker}_nohash_1.wav", np.full(4000, 100), rate=8000)
  write_clip(folder / "two" / f"{speaker}_nohash_0.wav", [[100, 200]] * RATE, channels=2)
  long = write_clip(folder / "long" / f"{speaker}_nohash_0.wav", np.arange(3 * RATE))
  data = opened()
  said = capsys.readouterr().err
  assert f"files converted, 8000 Hz: 2, such as slow/{speaker}_nohash_0.wav" in said
  assert f"files converted, 2 channels: 1, such as two/{speaker}_nohash_0.wav" in said
  assert f"files converted, longer than 1 s: 1, such as long/{speaker}_nohash_0.wav" in said
  notes = Path(said.split(" is in ")[1].strip()).read_text().splitlines()
  assert len(notes) == 4 and f"converted, 8000 Hz: slow/{speaker}_nohash_1.wav" in notes
  by_label = {data.labels[row["targets"]]: row for row in rows(data, "train")}
  np.testing.assert_array_equal(by_label["long"]["inputs"], long[RATE : 2 * RATE])
  assert (by_label["two"]["inputs"] == 150).all()
  assert by_label["slow"]["mask"].sum() == 500
  assert abs(by_label["slow"]["inputs"][250] - 100) <= 1


def test_what_is_not_used_is_told(tmp_path, opened, capsys):
  folder = tmp_path / "data"
  write_words(folder, ("no", "yes"), {"train": 2})
  (folder / "LICENSE").write_text("of all")
  for name in ("no/a.mp3", "maybe/b.ogg", "maybe/c.mp3"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
  assert opened().labels == ("no", "yes")
  assert "files not used, neither .wav nor .flac: 3, such as maybe/b.ogg" in capsys.readouterr().err
  clips = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.wav"))
  (folder / "train_list.tsv").write_text(f"{clips[1]}\tno\n{clips[2]}\tyes\n")
  assert len(opened().examples("train")) == 2
  assert f"files not used, in no list: 2, such as {clips[0]}" in capsys.readouterr().err


def test_a_link_to_nothing_is_a_bad_file(tmp_path, opened):
  write_words(tmp_path / "data", ("no", "yes"), {"train": 1})
  (tmp_path / "data" / "no" / "gone.wav").symlink_to("nowhere.wav")
  with pytest.raises(ValueError, match=r"data/no/gone.wav cannot be read: No such file"):
    opened()


def test_a_folder_around_all_is_passed_over(tmp_path, opened):
  write_words(tmp_path / "outer" / "data", ("no", "yes"), {"train": 2, "test": 1})
  (tmp_path / "outer" / "data" / "LICENSE").write_text("of all")
  expected = rows(opened(tmp_path / "outer" / "data"), "train")
  assert_same(rows(opened(tmp_path / "outer"), "train"), expected)
  assert_same(rows(opened(pack(tmp_path / "outer", tmp_path / "data.tar.gz")), "train"), expected)


def test_flac_is_read_beside_wav(tmp_path, opened):
  soundfile = pytest.importorskip("soundfile")
  clips = write_words(tmp_path / "data", ("no", "yes"), {"train": 2})
  before = rows(opened(), "train")
  for name in clips:
    path = tmp_path / "data" / name
    soundfile.write(path.with_suffix(".flac"), soundfile.read(path, dtype="int16")[0], RATE)
    path.unlink()
  assert_same(rows(opened(), "train"), before)


def test_missing_soundfile_is_no_bad_file(tmp_path, opened, monkeypatch):
  write_words(tmp_path / "data", ("no",), {"train": 1})
  (tmp_path / "data" / "no" / "x.flac").write_bytes(b"fLaC")
  monkeypatch.setitem(sys.modules, "soundfile", None)
  with pytest.raises(ValueError, match="pip install soundfile"):
    opened(on_bad="skip")


def test_what_holds_no_clips_is_refused(tmp_path, opened):
  folder = tmp_path / "data"
  folder.mkdir()
  write_clip(folder / "at_the_top.wav", [1])
  write_noise(folder, 1)
  with pytest.raises(ValueError, match=r"data has no clips, expected files such as yes/"):
    opened()
  (folder / "yes").mkdir()
  (folder / "yes" / "bad.wav").write_bytes(b"RIFF")
  with pytest.raises(ValueError, match=r"no clip that can be used, 1 files cannot: yes/bad.wav is"):
    opened(on_bad="skip")


def test_a_damaged_archive_is_named(tmp_path, opened):
  write_words(tmp_path / "data", ("no", "yes"), {"train": 3})
  whole = pack(tmp_path / "data", tmp_path / "whole.tar.gz").read_bytes()
  plain = gzip.decompress(whole)
  for data in (whole[:-20], whole[:200] + b"x" * 50 + whole[250:], gzip.compress(b"x" * 600), b""):
    path = tmp_path / "bad.tar.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad.tar.gz (cannot be read|has no clips)"):
      opened(path)
  (tmp_path / "cut.tar").write_bytes(plain[: len(plain) // 2 + 700])
  with pytest.raises(ValueError, match=r"cut.tar"):
    opened(tmp_path / "cut.tar")
