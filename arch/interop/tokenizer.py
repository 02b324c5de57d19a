"""The tokenizer of a Hugging Face folder, so that a fine-tuned model keeps its ids."""

from pathlib import Path

from ..data.tokenizers import SentencePieceTokenizer

FILE = "tokenizer.model"


def read_tokenizer(folder: Path, vocab_size: int) -> SentencePieceTokenizer | None:
  """The sentencepiece model in `folder`, if there is one, without the space it puts before a text.

  Ids and pieces are the original's. It would encode a text as if a space came first, which no
  decoder can tell from a space that is there; here the first word is encoded as it stands.

  Raises:
    ValueError: if it is damaged, has more ids than the model or no document boundary, or loses
      part of a text (by normalisation, or for want of byte fallback).
  """
  path = folder / FILE
  if not path.exists():
    return None
  try:
    # sentencepiece leaves it to us to bring the protobuf that its description of a model needs.
    from google.protobuf import message, runtime_version
    from sentencepiece import sentencepiece_model_pb2
  except (ImportError, TypeError) as error:
    raise ValueError(f"{path} needs protobuf, pip install 'triform[hub]': {error}") from error
  except runtime_version.VersionError as error:
    raise ValueError(
      f"{path} needs a newer protobuf, pip install 'triform[hub]': {error}"
    ) from error
  model = sentencepiece_model_pb2.ModelProto()
  try:
    model.ParseFromString(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    tokenizer = SentencePieceTokenizer(model.SerializeToString())
  except (message.DecodeError, RuntimeError) as error:
    raise ValueError(f"{path} is no sentencepiece model: {error}") from error
  problems = {
    "normalises": bool(model.normalizer_spec.precompiled_charsmap),
    "drops spaces": model.normalizer_spec.remove_extra_whitespaces,
    "has no byte fallback": not model.trainer_spec.byte_fallback,
    "has no ids for the ends of a text": min(tokenizer.bos_id, tokenizer.eos_id) < 0,
    f"has {tokenizer.vocab_size} ids, the model {vocab_size}": tokenizer.vocab_size > vocab_size,
  }
  if any(problems.values()):
    found = ", ".join(problem for problem, present in problems.items() if present)
    raise ValueError(f"{path} {found}: expected a tokenizer that loses nothing")
  return tokenizer
