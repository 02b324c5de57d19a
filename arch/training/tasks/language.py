"""Language modelling: the next token of a text."""

import functools

from ml_collections import ConfigDict

from ... import flops, hosts
from ...data.text import load_text
from ...evaluation import bits_per_byte, evaluate
from ..losses import count_pieces, next_token_loss
from .task import Task


class Language(Task):
  """The data is `data.text.TextData`; what is kept beside the model is the tokenizer."""

  unit = "tokens"
  evaluated = ("loss", "perplexity", "bits_per_byte")

  def __init__(self, config, vocabulary=None):
    if vocabulary is None and config.init_from is not None and config.data.tokenizer != "bytes":
      raise ValueError(
        f"{config.init_from} has parameters but no tokenizer, whose ids they know: expected its "
        "tokenizer.model beside them, or data.tokenizer=bytes"
      )
    self._config = config
    self._data = load_text(config.data, config.model.vocab_size, vocabulary)
    self.vocabulary = self._data.tokenizer
    documents = (*self._data.train, self._data.validation)
    sizes = [(len(part.tokens), len(part)) for part in documents]
    self.identity = "the text, or its tokenizer,", f"{self.vocabulary.fingerprint} {sizes}"

  @staticmethod
  def loss(config: ConfigDict, devices: int):
    rows = config.batch_size // config.accumulate
    pieces = count_pieces(rows, config.seq_len, config.model.vocab_size, devices)
    return functools.partial(next_token_loss, z_loss=config.z_loss, pieces=pieces)

  def batches(self, host, num_hosts):
    return self._data.batches(
      seq_len=self._config.seq_len,
      batch_size=self._config.batch_size,
      seed=self._config.seed,
      host=host,
      num_hosts=num_hosts,
      workers=self._config.data.workers,
    )

  def flops_per_unit(self):
    config = self._config
    return flops.train_flops_per_token(config.model, config.seq_len, config.form)

  def measures(self, batch, metrics):
    text_bytes = self.vocabulary.token_bytes[batch["targets"]][batch["loss_mask"]].sum()
    bits = bits_per_byte(metrics["total_loss"], hosts.total(int(text_bytes)))
    return {"loss": metrics["loss"], "bits_per_byte": bits}

  def evaluate(self, model):
    options = {k: v for k, v in self._config.eval.items() if k != "every_steps"}
    return evaluate(model, self._data.validation, self.vocabulary, **options)
