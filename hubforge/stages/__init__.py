"""Merge methods, one file each: `op: slerp` under `stages:` is `hubforge/stages/slerp.py`."""
