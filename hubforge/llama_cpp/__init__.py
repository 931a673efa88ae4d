"""llama.cpp, kept at arm's length: its converter, quantizer and runtime each run in a process of their own.

GGUF files and model folders come from strangers, and C++ answers a bad one with SIGABRT. In another process that is an
error message; and what it held in memory goes back at once.

tree        the converter's source, fetched once, pinned by sha256; or the user's own checkout
converter   a model folder -> an unquantized GGUF
quantizer   an unquantized GGUF -> a quantized one
runtime     logits, text and tokens from a GGUF
header      what a GGUF says of itself, read with bounds checked
fidelity    how close a GGUF is to the model it was made from
"""
