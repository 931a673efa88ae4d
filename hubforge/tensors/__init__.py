"""Checkpoints one tensor at a time: reader, writer, adapter deltas, and the streaming engine."""
