"""The command line. A package of its own, so that `mabert --help` imports neither torch nor transformers."""

from mabert_cli.app import main

__all__ = ["main"]
