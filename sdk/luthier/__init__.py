"""Luthier: post-train language models on your own machines."""

from importlib.metadata import version

__version__ = version("luthier")
