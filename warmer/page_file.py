"""The file of `--report-html`: looked at before a run begins, written when it is over, there whole or not at all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.output_file import expect_writable, write_whole
from warmer.history import History
from warmer.plots import expect_library
from warmer.run_page import check_page, run_page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from warmer.onlookers import Onlooker

_log = logging.getLogger(__name__)

OPTION: Final = "--report-html"


class PageFile:
    """A page that somebody may have asked for."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._history = History()

    def open(self, path: Path | None) -> tuple[Onlooker, ...]:
        """Make sure that the page can be written and drawn.

        Args:
            path: Of the page; None for none.

        Returns:
            Who has to look on for it.

        Raises:
            ConfigError: It cannot be written, or what draws its plots is not installed.
        """
        if path is None:
            return ()
        expect_writable(path, OPTION)
        expect_library()
        self._path = path
        return (self._history,)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the page of a summary, or of the record of a check. What was done stays done when that fails."""
        if self._path is None:
            return
        try:
            write_whole(
                self._path,
                run_page(record, self._history) if record["event"] == "summary" else check_page(record),
                OPTION,
            )
        except ConfigError as error:
            _log.warning("%s", error)
        except Exception:  # noqa: BLE001 - a plot that cannot be drawn says nothing about the run, and must not change its exit code
            _log.exception("%s: the page could not be drawn", OPTION)
