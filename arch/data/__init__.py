"""Data: corpora, tokenizers, packing.

Import from the modules, `triform.arch.data.text` and so on. Nothing is re-exported here, so that
serving can load a tokenizer without paying for TFDS and grain.
"""
