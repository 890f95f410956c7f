"""Files of rows as tests write them."""

import json
from pathlib import Path
from typing import Any


def json_lines(path: Path, *records: Any) -> Path:
    """One JSON text a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
