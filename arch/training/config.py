"""The configuration every file in `configs/` starts from."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config(**model) -> ConfigDict:
  """All fields of a run with their defaults; `model` is the complete description of the model."""
  return ConfigDict(
    {
      "model": model,
      "data": {
        "name": "python_stdlib",  # the corpus, unless one of the next three is given
        "path": placeholder(str),  # a file or folder of text; .jsonl and .gz as well
        "tfds": placeholder(str),  # a TFDS text data set, such as lm1b or c4/en
        "mixture": placeholder(str),  # such as tfds:pg19=0.7,path:~/notes=0.3, shares of the tokens
        "split": placeholder(str),  # of TFDS sets, such as train[:1%]; default train
        "validation": placeholder(str),  # a path or a TFDS split; default see load_text
        "text_field": placeholder(str),  # of records; default found by rule
        "prompt_field": placeholder(str),  # of records; prompts are read, not trained on
        "workers": 0,  # processes that read batches ahead; 0: threads
        "tokenizer": "sentencepiece",  # or "bytes"
        "dir": placeholder(str),  # prepared data; default $TRIFORM_DATA or ~/.cache/triform
      },
      "seed": 0,  # of parameters, data order and dropout
      "seq_len": 512,  # tokens in a training window
      "batch_size": 8,  # windows in a step
      "form": "chunkwise",  # algorithm of the training step
      "total_steps": 1000,
      "log_every_steps": 10,
      "optimizer": {
        "learning_rate": 1e-3,  # at its peak
        "warmup_steps": 100,  # linear from 0; at most a tenth of total_steps
        "final_fraction": 0.1,  # of the peak, where the cosine ends
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-8,
        "weight_decay": 0.05,  # of matrices; vectors are not decayed
        "clip_norm": 1.0,  # of the whole gradient
      },
      "eval": {
        "form": "chunkwise",
        "every_steps": 500,  # and at the last step
        "max_tokens": placeholder(int),  # of the held-out documents; default all
        "seq_len": 512,  # tokens in a piece; the state is carried from piece to piece
        "batch_size": 16,  # rows the held-out text is cut into
      },
      "checkpoint": {
        "every_steps": 500,  # and at the last step
        "keep": 3,
      },
      "compilation_cache": True,  # under ~/.cache/triform; off: compile anew each time
      "peak_flops": placeholder(float),  # FLOP/s of a device, for MFU; default known or measured
    }
  )
