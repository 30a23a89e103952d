"""A file of plan lines that appears under its name only when it is whole."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any, Self

from hfbucket_plugin.errors import ConfigError


class PlanOutput:
    """Writes the lines of a plan, JSON objects all of them. Use it as a context manager.

    Args:
        path: Of the plan.
        header: Its first line.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number, self._part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        except OSError as error:
            raise ConfigError(f"plan {str(path)!r} cannot be written: {error.strerror}") from None
        self._out: IO[str] = os.fdopen(number, "w", encoding="utf-8")
        self._write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        Path(self._part).unlink(missing_ok=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")

    def _end(self, totals: dict[str, Any]) -> None:
        """Write the last line: from now on the plan is there."""
        self._write({"record": "end"} | totals)
        self._out.flush()
        os.fsync(self._out.fileno())
        Path(self._part).replace(self._path)
