"""Small TFDS data sets, as if another program had prepared them."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


class _Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version("1.0.0")
  code_path = Path(__file__)
  pkg_dir_path = Path(__file__).parent
  splits: dict[str, list]
  fields: tuple[str, ...]

  def _info(self):
    features = {field: tfds.features.Text() for field in self.fields}
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({**features, "id": np.int64})
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(records) for split, records in self.splits.items()}

  def _generate_examples(self, records):
    for i, record in enumerate(records):
      yield i, {**dict(zip(self.fields, record, strict=True)), "id": i}


def prepare(folder, name, splits, *, fields=("text",), file_format="array_record"):
  """Prepares a set `name` of records by split, each a tuple with one string per field."""
  contents = {"name": name, "splits": splits, "fields": fields}
  builder = type(_Records)("Records", (_Records,), contents, skip_registration=True)
  tfds.disable_progress_bar()
  builder(data_dir=folder, file_format=file_format).download_and_prepare()
