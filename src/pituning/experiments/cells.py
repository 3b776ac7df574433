"""Figures that an experiment keeps between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any, indent: int = 1) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
