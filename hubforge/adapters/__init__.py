"""Adapters trained here: one way to train, one file."""
