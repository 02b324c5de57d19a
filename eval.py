"""Evaluates a run or an exported model, or generates from it.

python eval.py --workdir=runs/tiny --form=recurrent --json=result.json
python eval.py --workdir=runs/tiny --task=generate --prompt="def main("
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from triform.arch import FORMS, cli, load, stream
from triform.arch.loading import load_config

WORKDIR = flags.DEFINE_string("workdir", None, "the run, as given to train.py, or its export")
STEP = flags.DEFINE_integer("step", None, "the checkpoint to read; default the newest")
TASK = flags.DEFINE_enum("task", "loss", ["loss", "generate"], "what to do")

FORM = flags.DEFINE_enum("form", None, FORMS, "loss: the algorithm; default config.eval.form")
TEXT = flags.DEFINE_string("text", None, "loss: a text file or folder; default held-out documents")
JSON = flags.DEFINE_string("json", None, "loss: write the result to this file as well")

PROMPT = flags.DEFINE_string("prompt", None, "generate: the text to continue")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "generate: a file with it, - for stdin")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "generate: the most to make")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "generate: 0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", None, "generate: sample among so many likeliest tokens")
TOP_P = flags.DEFINE_float("top_p", None, "generate: sample among the likeliest of this mass")
SEED = flags.DEFINE_integer("seed", 0, "generate: the same seed gives the same text")
flags.mark_flag_as_required("workdir")


def _workdir_config() -> ConfigDict:
  """The run's own configuration, so that any `--config.x=y` overrides it."""
  workdir = cli.early_flag("workdir")
  try:
    return ConfigDict() if workdir is None else load_config(workdir)
  except ValueError as error:
    cli.fail(error)


CONFIG = config_flags.DEFINE_config_dict("config", _workdir_config())


def main() -> int:
  if TASK.value == "generate":
    return generate()
  return measure()


def measure() -> int:
  from triform.arch.data.text import documents_from_path, load_text
  from triform.arch.evaluation import evaluate

  config = CONFIG.value
  model, tokenizer = load(WORKDIR.value, step=STEP.value, config=config)
  if TEXT.value is None:
    documents = load_text(config.data, config.model.vocab_size, tokenizer=tokenizer).validation
  else:
    documents = documents_from_path(TEXT.value, tokenizer)
  options = {name: value for name, value in config.eval.items() if name != "every_steps"}
  options["form"] = FORM.value or config.eval.form
  result = {**evaluate(model, documents, tokenizer, **options), "form": options["form"]}
  for name, value in result.items():
    print(f"{name:<14}  {value:,.6g}" if isinstance(value, float) else f"{name:<14}  {value}")
  if JSON.value is not None:
    Path(JSON.value).write_text(json.dumps(result) + "\n")
  return 0


def generate() -> int:
  from triform.arch.data.tokenizers import StreamDecoder

  prompt = PROMPT.value or ""
  if PROMPT_FILE.value is not None:
    if PROMPT.value is not None:
      raise ValueError("give --prompt or --prompt_file, not both")
    from_stdin = PROMPT_FILE.value == "-"
    raw = sys.stdin.buffer.read() if from_stdin else Path(PROMPT_FILE.value).read_bytes()
    prompt = raw.decode("utf-8")
  model, tokenizer = load(WORKDIR.value, step=STEP.value, config=CONFIG.value)
  decoder = StreamDecoder(tokenizer)
  sys.stdout.write(prompt)
  for (token,) in stream(
    model,
    [tokenizer.bos_id, *tokenizer.encode(prompt)],
    max_new_tokens=MAX_NEW_TOKENS.value,
    temperature=TEMPERATURE.value,
    top_k=TOP_K.value,
    top_p=TOP_P.value,
    seed=SEED.value,
  ):
    if token == tokenizer.eos_id:
      break
    sys.stdout.write(decoder.push(token))
    sys.stdout.flush()
  print(decoder.flush())
  return 0


if __name__ == "__main__":
  cli.run(main)
