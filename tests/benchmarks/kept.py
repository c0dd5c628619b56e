"""Readings that are in a JSON file as soon as each is made, so that a long measurement that was cut off can go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine


class Kept:
    """The readings of *work* in *file*, by name; those that it has from before count only with *resume*."""

    def __init__(self, file: Path, work: str, *, resume: bool) -> None:
        before = json.loads(file.read_text(encoding="utf-8")) if resume and file.is_file() else {}
        self.file = file
        self.report = before if before.get("work") == work else {"work": work, "machine": machine(), "readings": {}}
        file.parent.mkdir(parents=True, exist_ok=True)

    def reading(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the reading called *name*, made and written down unless it is there."""
        readings = self.report["readings"]
        if name not in readings:
            readings[name] = measure()
            self.file.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        return readings[name]
