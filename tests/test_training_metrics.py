import io
import json
import math
import re
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from triform.arch.training.metrics import MetricWriter, format_line


def read_lines(workdir):
  """The records of `metrics.jsonl`, but for the time left, which no test can know."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in record.items() if k != "eta"} for record in records]


def read_events(workdir):
  """Events in the order written: a record is length (8), checksum (4), payload, checksum (4)."""
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def scalars(workdir):
  return [(e.step, v.tag, v.simple_value) for e in read_events(workdir) for v in e.summary.value]


@pytest.mark.parametrize(
  ("metrics", "text"),
  [
    ({"loss": 2.3141592}, "loss 2.314"),
    ({"learning_rate": 3e-4, "grad_norm": 1.0}, "learning_rate 0.0003  grad_norm 1"),
    ({"tokens/s": 21300.4}, "tokens/s 21,300"),
    ({"mfu": 0.412, "eta": 190.2}, "mfu 41%  eta 3m10s"),
    ({"eval_loss": math.nan, "loss": math.inf}, "eval_loss nan  loss inf"),
    ({"eta": 0.4}, "eta 0s"),
    ({"eta": 59.6}, "eta 1m00s"),
    ({"eta": 7500}, "eta 2h05m"),
    ({"eta": 180000}, "eta 2d02h"),
  ],
)
def test_format_line(metrics, text):
  assert format_line(100, 2000, metrics) == f"step 100/2000  {text}"


def test_every_write_is_a_json_line_and_scalars(tmp_path, capsys):
  with MetricWriter(tmp_path, total_steps=30, start_step=0) as writer:
    writer.write(10, {"loss": np.float32(2.5), "mfu": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10, "loss": 2.5, "mfu": 0.25}\n'
    writer.write(10, {"eval_loss": 3})
    writer.write(30, {"loss": math.nan, "grad_norm": -math.inf})
  assert read_lines(tmp_path)[1:] == [
    {"step": 10, "eval_loss": 3.0},
    {"step": 30, "loss": None, "grad_norm": None},
  ]
  written = scalars(tmp_path)
  assert written[:3] == [(10, "loss", 2.5), (10, "mfu", 0.25), (10, "eval_loss", 3.0)]
  assert written[3][:2] == (30, "loss") and math.isnan(written[3][2])
  assert written[4] == (30, "grad_norm", -math.inf)
  assert capsys.readouterr().out.splitlines() == [
    "step 10/30  loss 2.5  mfu 25%",
    "step 10/30  eval_loss 3",
    "step 30/30  loss nan  grad_norm -inf",
  ]


def test_time_left_counts_from_the_end_of_the_first_step(tmp_path, capsys, monkeypatch):
  clock = iter([100.0, 104.0])
  fake = types.SimpleNamespace(monotonic=lambda: next(clock))
  monkeypatch.setattr("triform.arch.training.metrics.time", fake)
  with MetricWriter(tmp_path, total_steps=40, start_step=10) as writer:
    writer.advance(11)
    writer.write(13, {"loss": 1.0})
  assert capsys.readouterr().out == "step 13/40  loss 1  eta 54s\n"


def test_resuming_drops_lost_steps_and_a_torn_line(tmp_path):
  with MetricWriter(tmp_path, total_steps=50, start_step=0) as writer:
    for step in (10, 20, 30):
      writer.write(step, {"loss": step})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 20, "lo')
  with MetricWriter(tmp_path, total_steps=50, start_step=20) as writer:
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20]
    writer.write(30, {"loss": 300})
  assert read_lines(tmp_path) == [
    {"step": step, "loss": loss} for step, loss in ((10, 10), (20, 20), (30, 300))
  ]
  [purged] = [e.step for e in read_events(tmp_path) if e.HasField("session_log") and e.step != 1]
  assert purged == 21


def test_resuming_completes_a_last_line_without_newline(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}')
  with MetricWriter(tmp_path, total_steps=50, start_step=10) as writer:
    writer.write(20, {"loss": 2.0})
  assert [line["step"] for line in read_lines(tmp_path)] == [10, 20]


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setenv("COLUMNS", "200")
  with MetricWriter(tmp_path, total_steps=100, start_step=40) as writer:
    for step in range(41, 61):
      writer.advance(step)
    writer.write(60, {"loss": 2.0, "tokens/s": 21300})
    writer.write(60, {"eval_loss": 2.25})
  text = terminal.getvalue()
  assert "40/100" in text
  assert re.search(r"60/100 .*loss 2  tokens/s 21,300\]", text)
  assert "\rstep 60/100  eval_loss 2.25\n" in text
