"""Smaller files of a model, one format each: `op: gguf` under `quantize:` is `hubforge/quantize/gguf.py`."""
