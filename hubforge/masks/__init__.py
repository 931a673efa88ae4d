"""Masks: what a merge or a training run should spare. One file each: `op: fisher` is `hubforge/masks/fisher.py`."""
