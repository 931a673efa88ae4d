"""Repositories on a folder: git's identifiers, JSON commits, content-addressed files."""
