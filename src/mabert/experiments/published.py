"""The paper's own numbers, to stand beside ours."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

SOURCE = "arXiv 2603.03001"


@cache
def published() -> dict[str, Any]:
    """Tables 1 to 3 and B1 to B7: row -> column -> number, or [mean, standard deviation] over five seeds."""
    return json.loads(files("mabert.experiments").joinpath("published.json").read_text(encoding="utf-8"))
