"""Whose the files of a tier are: engines often run as another user than Ray."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from typing import TYPE_CHECKING

from warmer.errors import TierError

if TYPE_CHECKING:
    from pathlib import Path

    from warmer.tiers.options import TierOptions

_LEAVE = -1
"""What `chown` takes for an id that stays."""


class Ownership:
    """Gives files away.

    Args:
        tier: Names it in errors.
        options: `chown` and `chmod` of them.

    Raises:
        TierError: This node has no such user or group.
    """

    def __init__(self, tier: str, options: TierOptions) -> None:
        self._tier = tier
        self._chmod = options.chmod
        self._asked = options.chown
        self._ids = (_LEAVE, _LEAVE)
        if options.chown is not None:
            user, _, group = options.chown.partition(":")
            self._ids = (self._user(user), self._group(group))

    def _user(self, name: str) -> int:
        if not name:
            return _LEAVE
        if name.isascii() and name.isdigit():
            return int(name)
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            raise TierError(f"tier {self._tier!r}: this node has no user {name!r} for --chown") from None

    def _group(self, name: str) -> int:
        if not name:
            return _LEAVE
        if name.isascii() and name.isdigit():
            return int(name)
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            raise TierError(f"tier {self._tier!r}: this node has no group {name!r} for --chown") from None

    def give(self, descriptor: int, directory: os.stat_result) -> None:
        """Give an open file its owner, group and mode.

        Args:
            descriptor: Of the file.
            directory: What `stat` says of the directory in which it lies.

        Raises:
            TierError: What was asked for is not permitted.
        """
        self._chown(descriptor, directory)
        if self._chmod is not None:
            try:
                os.fchmod(descriptor, self._chmod)
            except OSError as error:
                raise TierError(
                    f"tier {self._tier!r}: files cannot get the mode {self._chmod:o}: {error.strerror}"
                ) from None

    def _chown(self, file: int | Path, directory: os.stat_result) -> None:
        if self._asked is not None:
            try:
                os.chown(file, *self._ids)
            except OSError as error:
                raise TierError(
                    f"tier {self._tier!r}: files cannot be given to {self._asked!r}: {error.strerror}; only root may "
                    "give files to another user, and only to a group of its own may another user"
                ) from None
            return
        found = os.stat(file)  # noqa: PTH116 - it may be a descriptor
        for ids in ((directory.st_uid, _LEAVE), (_LEAVE, directory.st_gid)):
            if ids not in ((found.st_uid, _LEAVE), (_LEAVE, found.st_gid)):
                with contextlib.suppress(OSError):  # as far as it goes: `check_readable` looks at what came of it
                    os.chown(file, *ids)

    def check_readable(self, descriptor: int, directory: os.stat_result) -> None:
        """See whether whoever owns the directory, most likely the engine, could read a file that was given away.

        Raises:
            TierError: It could not.
        """
        if self._asked is not None or self._chmod is not None or directory.st_uid == 0:
            return
        found = os.fstat(descriptor)
        if found.st_uid == directory.st_uid:
            readable = found.st_mode & stat.S_IRUSR
        else:
            shared = stat.S_IRGRP if found.st_gid == directory.st_gid else 0
            readable = found.st_mode & (shared | stat.S_IROTH)
        if not readable:
            raise TierError(
                f"tier {self._tier!r}: files would belong to user {found.st_uid} with the mode "
                f"{stat.S_IMODE(found.st_mode):o}, and the directory's owner, user {directory.st_uid}, could not read "
                "them; set --chmod, or --chown, or the umask of Ray's workers"
            )

    def make(self, directory: Path) -> None:
        """Make a directory where there is none, and those above it; each as its parent is, or as was asked for.

        Raises:
            OSError: It cannot be made.
            TierError: What was asked for is not permitted.
        """
        missing = []
        while not directory.is_dir() and directory != directory.parent:
            missing.append(directory)
            directory = directory.parent
        for one in reversed(missing):
            try:
                one.mkdir()
            except (
                FileExistsError
            ):  # another raylet was faster; or a file is in its place, which shows at the next step
                continue
            self._chown(one, one.parent.stat())
