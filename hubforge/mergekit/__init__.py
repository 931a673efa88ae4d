"""mergekit's configurations, read for what they ask and written as recipes."""

from hubforge.mergekit.documents import import_mergekit

__all__ = ["import_mergekit"]
