"""A trained model as one folder, which `load` and `eval.py` read on any machine.

python -m triform.arch.export --workdir=runs/tiny --to=tiny
"""

import os
from pathlib import Path

from .folder import check_replaceable, write_folder
from .loading import open_workdir


def export(
  workdir: str | os.PathLike,
  to: str | os.PathLike,
  *,
  step: int | None = None,
  best: bool = False,
) -> int:
  """Writes a model of the run in `workdir` to the folder `to`.

  Takes the newest checkpoint, that of `step`, or with `best` that of the lowest evaluation loss;
  the averaged parameters where the run kept an average. An exported folder at `to` is
  replaced; see `arch.folder` for what is in one. Returns the step.
  Raises `ValueError` if `workdir` is not a run's or has no such checkpoint, or if `to` is
  something else than an exported folder.
  """
  check_replaceable(Path(to).resolve())
  run = open_workdir(Path(workdir), step, best)
  write_folder(to, config=run.config, tensors=run.tensors, vocabulary=run.vocabulary, step=run.step)
  return run.step


if __name__ == "__main__":
  from absl import flags

  from . import cli

  WORKDIR = flags.DEFINE_string("workdir", None, "the run, as given to train.py")
  TO = flags.DEFINE_string("to", None, "the folder to write; an exported one is replaced")
  STEP = flags.DEFINE_integer("step", None, "the checkpoint to take; default the newest")
  BEST = flags.DEFINE_bool("best", False, "take that of the lowest evaluation loss, if kept")
  flags.mark_flags_as_required(["workdir", "to"])

  def main() -> int:
    step = export(WORKDIR.value, TO.value, step=STEP.value, best=BEST.value)
    print(f"{TO.value} holds the model of {WORKDIR.value} after step {step}")
    return 0

  cli.run(main)
