"""A trained model as one folder, which `load` and `eval.py` read on any machine.

python -m triform.arch.export --workdir=runs/tiny --to=tiny
"""

import os
from pathlib import Path

from .folder import check_replaceable, write_folder
from .loading import open_workdir


def export(workdir: str | os.PathLike, to: str | os.PathLike, *, step: int | None = None) -> None:
  """Writes the model of the newest checkpoint in `workdir`, or that of `step`, to the folder `to`.

  The averaged parameters where the run kept an average. An exported folder at `to` is replaced;
  see `arch.folder` for what is in one.
  Raises `ValueError` if `workdir` is not a run's or has no such checkpoint, or if `to` is
  something else than an exported folder.
  """
  check_replaceable(Path(to).resolve())
  run = open_workdir(Path(workdir), step)
  write_folder(to, config=run.config, tensors=run.tensors, tokenizer=run.tokenizer, step=run.step)


if __name__ == "__main__":
  from absl import flags

  from . import cli

  WORKDIR = flags.DEFINE_string("workdir", None, "the run, as given to train.py")
  TO = flags.DEFINE_string("to", None, "the folder to write; an exported one is replaced")
  STEP = flags.DEFINE_integer("step", None, "the checkpoint to take; default the newest")
  flags.mark_flags_as_required(["workdir", "to"])

  def main() -> int:
    export(WORKDIR.value, TO.value, step=STEP.value)
    return 0

  cli.run(main)
