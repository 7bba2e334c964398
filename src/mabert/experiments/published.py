"""The paper's own numbers, to stand beside ours."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

SOURCE = "arXiv 2603.03001"
TRANSMAMBA = "arXiv 2503.24067"


@cache
def published() -> dict[str, Any]:
    """MaBERT's Tables 1 to 3 and B1 to B7: row -> column -> number, or [mean, standard deviation] over five seeds;
    TransMamba's Tables 5 and 6: row -> number."""
    return json.loads(files("mabert.experiments").joinpath("published.json").read_text(encoding="utf-8"))
