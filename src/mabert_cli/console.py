"""What the commands share in writing to the terminal."""

import logging
from collections.abc import Iterable

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

output = Console(highlight=False)
errors = Console(stderr=True)


def show_log(debug: bool) -> None:
    """Let the messages of the package through: at INFO the backend in use, what a resume skipped, and the like."""
    logger = logging.getLogger("mabert")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=errors, show_time=False, show_path=False))
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


def table(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """Two columns, names and values."""
    grid = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(escape(name), escape(str(value)))
    return grid
