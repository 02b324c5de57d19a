"""Evaluates a run or an exported model, or generates from it.

python eval.py --workdir=runs/tiny --form=recurrent --json=result.json
python eval.py --workdir=runs/tiny --task=positions --text=book.txt --picture=result.png
python eval.py --workdir=runs/tiny --task=generate --prompt="def main("
python eval.py --workdir=runs/lmu_psmnist --split=validation
python eval.py --workdir=runs/lmuformer_tones_tiny --json=result.json --picture=result.png
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from triform.arch import FORMS, cli, load, stream
from triform.arch.caches import enable_compilation_cache
from triform.arch.loading import load_config
from triform.arch.models.registry import find

WORKDIR = flags.DEFINE_string("workdir", None, "the run, as given to train.py, or its export")
STEP = flags.DEFINE_integer("step", None, "the checkpoint to read; default the newest")
BEST = flags.DEFINE_bool("best", False, "read that of the lowest evaluation loss, if kept")
TASK = flags.DEFINE_enum(
  "task",
  None,
  ["loss", "positions", "generate", "accuracy"],
  "what to do; default loss, or accuracy of a classifier",
)

FORM = flags.DEFINE_enum("form", None, FORMS, "to measure: the algorithm; default eval.form")
TEXT = flags.DEFINE_string("text", None, "to measure: a file or folder; default held-out text")
SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "accuracy: on which examples")
JSON = flags.DEFINE_string("json", None, "to measure: write the result to this file as well")

WINDOW = flags.DEFINE_integer("window", None, "positions: of the sliding window; default seq_len")
PICTURE = flags.DEFINE_string("picture", None, "positions, accuracy: draw it to this file")

PROMPT = flags.DEFINE_string("prompt", None, "generate: the text to continue")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "generate: a file with it, - for stdin")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "generate: the most to make")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "generate: 0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", None, "generate: sample among so many likeliest tokens")
TOP_P = flags.DEFINE_float("top_p", None, "generate: sample among the likeliest of this mass")
SEED = flags.DEFINE_integer("seed", 0, "generate: the same seed gives the same text")
flags.mark_flag_as_required("workdir")

# What models are for, and the tasks for those.
MODELS = {
  "language": ("a language model", ("loss", "positions", "generate")),
  "classification": ("a classifier", ("accuracy",)),
}

# The flags that only some tasks look at.
TASKS = {
  **dict.fromkeys(("form", "json"), ("loss", "positions", "accuracy")),
  **dict.fromkeys(("text",), ("loss", "positions")),
  **dict.fromkeys(("split",), ("accuracy",)),
  **dict.fromkeys(("picture",), ("positions", "accuracy")),
  **dict.fromkeys(("window",), ("positions",)),
  **dict.fromkeys(("prompt", "prompt_file", "max_new_tokens"), ("generate",)),
  **dict.fromkeys(("temperature", "top_k", "top_p", "seed"), ("generate",)),
}


def _workdir_config() -> ConfigDict:
  """The run's own configuration, so that any `--config.x=y` overrides it."""
  workdir = cli.early_flag("workdir")
  try:
    return ConfigDict() if workdir is None else load_config(workdir)
  except ValueError as error:
    cli.fail(error)


CONFIG = cli.define_config(_workdir_config())


def main() -> int:
  task = _task()
  if CONFIG.value.get("compilation_cache", True):
    enable_compilation_cache()
  programs = {"loss": loss, "positions": positions, "generate": generate, "accuracy": accuracy}
  return programs[task]()


def _task() -> str:
  """The task, for which the model and all flags that are given have to be."""
  model = CONFIG.value.get("model", {"architecture": None})
  kind, possible = MODELS[find(model["architecture"]).task]
  task = possible[0] if TASK.value is None else TASK.value
  if task not in possible:
    raise ValueError(
      f"--task={task} is not for {kind} such as {WORKDIR.value}, expected --task="
      f"{' or '.join(possible)}"
    )
  for name, tasks in TASKS.items():
    if flags.FLAGS[name].present and task not in tasks:
      if others := [other for other in tasks if other in possible]:
        raise ValueError(f"--{name} is for --task={' or '.join(others)}, not {task}")
      raise ValueError(f"--{name} is not for {kind} such as {WORKDIR.value}")
  return task


def loss() -> int:
  from triform.arch.evaluation import evaluate

  model, documents, tokenizer, options = _measured()
  result = {**evaluate(model, documents, tokenizer, **options), "form": options["form"]}
  _tell(result)
  _write(result)
  return 0


def accuracy() -> int:
  from triform.arch.classifier_report import classifier_report, draw, table
  from triform.arch.data.speech import SpeechCommands
  from triform.arch.loss_by_position import import_pyplot
  from triform.arch.training.tasks.classification import load_examples

  if PICTURE.value is not None:
    import_pyplot()  # or it would be missed after all the work
  config = CONFIG.value
  model, labels = load(WORKDIR.value, step=STEP.value, best=BEST.value, config=config)
  data = load_examples(config.data, labels)
  options = {"batch_size": config.eval.batch_size, "form": FORM.value or config.eval.form}
  if isinstance(data, SpeechCommands):
    options["recordings"] = data.noise(SPLIT.value)
  result = classifier_report(model, data.examples(SPLIT.value), data.labels, **options)
  result |= {"split": SPLIT.value, "form": options["form"]}
  first = ("loss", "accuracy", "interval", "examples", "split", "form")
  _tell({name: result[name] for name in first})
  print(table(result))
  _write(result)
  if PICTURE.value is not None:
    draw(result, PICTURE.value)
  return 0


def positions() -> int:
  from triform.arch.loss_by_position import draw, import_pyplot, loss_by_position, table

  if PICTURE.value is not None:
    import_pyplot()  # or it would be missed after all the work
  model, documents, tokenizer, options = _measured()
  options["window"] = CONFIG.value.seq_len if WINDOW.value is None else WINDOW.value
  result = loss_by_position(model, documents, tokenizer, **options) | {"form": options["form"]}
  print(table(result))
  _write(result)
  if PICTURE.value is not None:
    draw(result, PICTURE.value)
  return 0


def _measured() -> tuple:
  """The model, documents, tokenizer and how to evaluate, as the flags have it."""
  from triform.arch.data.text import documents_from_path, load_text

  config = CONFIG.value
  model, tokenizer = load(WORKDIR.value, step=STEP.value, best=BEST.value, config=config)
  if TEXT.value is None:
    documents = load_text(config.data, config.model.vocab_size, tokenizer=tokenizer).validation
  else:
    documents = documents_from_path(TEXT.value, tokenizer)
  options = {name: value for name, value in config.eval.items() if name != "every_steps"}
  return model, documents, tokenizer, options | {"form": FORM.value or config.eval.form}


def _tell(result: dict) -> None:
  for name, value in result.items():
    values = value if isinstance(value, tuple) else (value,)
    shown = " to ".join(f"{v:,.6g}" if isinstance(v, float) else str(v) for v in values)
    print(f"{name:<14}  {shown}")


def _write(result: dict) -> None:
  if JSON.value is not None:
    Path(JSON.value).write_text(json.dumps(result) + "\n")


def generate() -> int:
  from triform.arch.data.tokenizers import StreamDecoder

  prompt = PROMPT.value or ""
  if PROMPT_FILE.value is not None:
    if PROMPT.value is not None:
      raise ValueError("give --prompt or --prompt_file, not both")
    from_stdin = PROMPT_FILE.value == "-"
    raw = sys.stdin.buffer.read() if from_stdin else Path(PROMPT_FILE.value).read_bytes()
    try:
      prompt = raw.decode("utf-8")
    except UnicodeDecodeError as error:
      source = "standard input" if from_stdin else PROMPT_FILE.value
      raise ValueError(f"expected UTF-8 text in {source}: {error}") from error
  model, tokenizer = load(WORKDIR.value, step=STEP.value, best=BEST.value, config=CONFIG.value)
  decoder = StreamDecoder(tokenizer)
  sys.stdout.write(prompt)
  for (token,) in stream(
    model,
    [tokenizer.bos_id, *tokenizer.encode(prompt)],
    max_new_tokens=MAX_NEW_TOKENS.value,
    temperature=TEMPERATURE.value,
    top_k=TOP_K.value,
    top_p=TOP_P.value,
    vocab_size=min(tokenizer.vocab_size, model.vocab_size),
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
