"""Whole objects that hf_xet writes into files by itself: their bytes never pass through Python.

For files that nobody looks at before they are complete, such as the drafts of a tier. Where a caller's memory is to be filled,
or memory that it may take back, `transfer.Read` streams into a lease.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import hf_xet

from hfbucket_plugin.errors import HFBucketError, IntegrityError, LocalFileError, RevokedError, TransportError
from hfbucket_plugin.hub.xet_session import typed_errors

if TYPE_CHECKING:
    from pathlib import Path

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.xet_session import XetSession

_LOCAL: Final = re.compile(r"\bIO Error: .*\(os error (\d+)\)")
"""How hf_xet 1.8 tells what the disk refused; what it says of the network has no such number."""

_MISMATCH: Final = "File size mismatch"
"""How it tells that the object has not as many bytes as it was said to have."""


@dataclass(slots=True, eq=False)
class DownloadToFile:
    """One object to be written into one file, which hf_xet makes.

    Attributes:
        name: Names the object in errors: its key or path.
        content: What to read.
        path: Where to, in a directory that is there and in which nobody else may write: hf_xet follows links, and makes directories
            that are missing. There must be no such file; it is there when the read is done, and may be there, with anything
            in it, when it has failed.
        error: Why it failed; None while it has not.
        done: Whether every byte has arrived.
        asked: Bytes that the store was asked for, each try counted; hf_xet's own retries are not known.
    """

    name: str
    content: ContentId
    path: Path
    error: HFBucketError | None = None
    done: bool = False
    asked: int = 0
    _live: bool = True
    _handle: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def live(self) -> bool:
        """Whether it goes on."""
        return self._live

    def give_up(self) -> None:
        """Stop it: its waiter is freed at once. Never raises."""
        with self._lock:
            self._live = False
            handle = self._handle
        if handle is not None:
            handle.cancel()

    def fail(self, error: HFBucketError) -> None:
        """Note the first error, and stop."""
        if self.error is None:
            self.error = error
        self.give_up()

    def fetch(self, session: XetSession, attempt: int) -> None:
        """Have hf_xet write the file, and wait for it.

        Blocks its thread until hf_xet answers, or `give_up` is called.

        Args:
            session: For reading.
            attempt: Which try it is, from 0 on: each has a file of its own, so that what is left of one never writes into
                another's.

        Raises:
            LocalFileError: The disk did not take it.
            HFBucketError: The store did not send it.
        """
        path = self.path if not attempt else self.path.with_name(f"{self.path.stem}-{attempt}{self.path.suffix}")
        try:
            self._write(session, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            if (number := self._local(error)) is not None:
                raise LocalFileError(f"{self.name}: {path}: {os.strerror(number)}", number) from None
            raise

    def _write(self, session: XetSession, path: Path) -> None:
        size = self.content.size
        self._expect_live()
        if size:
            info = hf_xet.XetFileInfo(self.content.xet_hash, size)
            try:
                with typed_errors(self.name), session.download(info, path) as handle:
                    self._wait(handle)
            except TransportError as error:
                if _MISMATCH in str(error):
                    raise IntegrityError(str(error)) from None
                raise
        else:
            path.touch(exist_ok=False)
        # By what is there: a store that has lost a content may send nothing, and say nothing.
        if (arrived := path.stat().st_size) != size:
            raise IntegrityError(f"{self.name}: {arrived} of {size} bytes arrived")
        if path is not self.path:
            self._expect_live()
            path.replace(self.path)

    def _expect_live(self) -> None:
        if not self._live:
            raise RevokedError(f"{self.name}: given up before it was read")

    def _wait(self, handle: Any) -> None:
        with self._lock:
            self._handle = handle
            live = self._live
        try:
            if not live:
                handle.cancel()
                self._expect_live()
            handle.result()
        finally:
            with self._lock:
                self._handle = None

    def _local(self, error: BaseException) -> int | None:
        """What the system said, where it was this machine that failed; None where it was the store, or the network."""
        if isinstance(error, HFBucketError):
            found = _LOCAL.search(str(error).removeprefix(self.name))  # names are other people's
            return int(found[1]) if found else None
        return error.errno if isinstance(error, OSError) else None
