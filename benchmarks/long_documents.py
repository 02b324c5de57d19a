"""Loss by position in documents 100 times longer than training windows.

    python benchmarks/long_documents.py --workdir=runs/retnet_tiny [--json=FILE] [--picture=FILE]

The held-out documents of the run's corpus, joined end to end without marks between them, are cut
into documents of 100 training windows (what is left over is not used); of each the loss is
measured with the state carried and with a sliding window of the training length. The picture needs
matplotlib (the `plot` extra).
"""

import json
import platform
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from triform.arch import load
from triform.arch.data.packing import Documents
from triform.arch.data.text import load_text
from triform.arch.loss_by_position import draw, loss_by_position, table
from triform.arch.training.workdir import load_config

WORKDIR = flags.DEFINE_string("workdir", None, "the run")
JSON = flags.DEFINE_string("json", None, "file to write the result to")
PICTURE = flags.DEFINE_string("picture", None, "file to draw to")
flags.mark_flag_as_required("workdir")

WINDOWS = 100  # in a document


def main(_):
  config = load_config(WORKDIR.value)
  model, tokenizer = load(WORKDIR.value)
  tokens = load_text(config.data, config.model.vocab_size, tokenizer=tokenizer).validation.tokens
  length = WINDOWS * config.seq_len
  count = len(tokens) // length
  if not count:
    raise ValueError(f"{len(tokens)} held-out tokens, expected at least {length}")
  documents = Documents(tokens[: count * length], length * np.arange(1, count + 1))
  result = loss_by_position(model, documents, tokenizer, window=config.seq_len, batch_size=count)
  print(table(result))
  if JSON.value:
    where = {"jax": jax.__version__, "python": platform.python_version()}
    where["device"] = jax.devices()[0].device_kind
    rows = [row | where for row in result["positions"]]
    Path(JSON.value).write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
  if PICTURE.value:
    draw(result, PICTURE.value)


if __name__ == "__main__":
  app.run(main)
