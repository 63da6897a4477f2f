"""Packages that this one uses if they are installed, and does not bring."""

import importlib
from typing import Any


def needed(package: str, what: str) -> Any:
    """The package; without it an ImportError that says what needs it, and how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"{what} needs {package}: pip install {package}") from None
