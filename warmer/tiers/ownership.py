"""Whose the files of a tier are: engines often run as another user than Ray."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from typing import TYPE_CHECKING, Final

from warmer.errors import TierError
from warmer.tiers.leftovers import RUN_FILES

if TYPE_CHECKING:
    from pathlib import Path

    from warmer.tiers.options import TierOptions

_LEAVE = -1
"""What `chown` takes for an id that stays."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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

    def _chown(self, file: int, directory: os.stat_result) -> None:
        if self._asked is not None:
            try:
                os.chown(file, *self._ids)
            except OSError as error:
                raise TierError(
                    f"tier {self._tier!r}: files cannot be given to {self._asked!r}: {error.strerror}; only root may "
                    "give files to another user, and only to a group of its own may another user"
                ) from None
            return
        found = os.fstat(file)
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
        """Make a directory where there is none; see `open`."""
        os.close(self.open(directory))

    def open(self, directory: Path) -> int:
        """Open a directory; make it where there is none, and those above it; each as its parent is, or as was asked for.

        What was made is reached by descriptors from then on. Whoever owns the parent may have put something else in its place meanwhile,
        which must not be given away.

        Returns:
            Its descriptor.

        Raises:
            OSError: It cannot be made.
            TierError: What was asked for is not permitted; or something else came in the place of what was made.
        """
        missing = []
        while not directory.is_dir() and directory != directory.parent:
            missing.append(directory)
            directory = directory.parent
        opened = os.open(directory, _DIRECTORY)
        while missing:
            one = missing.pop()
            parent = opened
            try:
                opened = self.make_in(parent, one.name, missing[-1].name if missing else "")
            finally:
                os.close(parent)
        return opened

    def make_in(self, parent: int, name: str, below: str = "") -> int:
        """Make a directory inside of another one, or open the one that is there.

        Args:
            parent: Descriptor of the directory in which it is to lie.
            name: Of the new one.
            below: What another process may have made in it already, beside the files of its run.

        Returns:
            Its descriptor.

        Raises:
            OSError: It cannot be made.
            TierError: See `make`.
        """
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:  # another raylet was faster; or something that is no directory is in its place
            return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        made = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            self._expect_new(made, name, below)
            self._chown(made, os.fstat(parent))
        except BaseException:
            os.close(made)
            raise
        return made

    def _expect_new(self, made: int, name: str, below: str) -> None:
        with os.scandir(made) as entries:
            others = any(entry.name != below and not entry.name.startswith(RUN_FILES) for entry in entries)
        if others or os.fstat(made).st_uid != os.geteuid():
            raise TierError(
                f"tier {self._tier!r}: directory {name!r} was replaced while it was being made, by a process that may write to "
                "its parent; nothing was given away. Make the directory beforehand, as its owner"
            )
