"""Directories that hf_xet writes to, and the errors if it cannot.

hf_xet's sessions keep files, which `SessionPool` places in a directory of this package, and create a directory per
store below a root that only the environment sets. In an engine the environment must not change, so an unusable root is
an error that names it; in a process of this package, such as a command, the root and the logs move to the package's own
directory. Does not import hf_xet, which opens its log on import.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.files import default_root
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_CACHE: Final = "HF_XET_CACHE"
_LOG: Final = "HF_XET_LOG_DEST"
_PLACES: Final = ((_CACHE, ()), ("HF_HOME", ("xet",)), ("XDG_CACHE_HOME", ("huggingface", "xet")))
_ROOT_NAME: Final = "xet"
_LOG_NAME: Final = "xet-logs"

_lock = forks.ForkSafeLock()
_ours: list[int] = []
"""Id of the process that belongs to this package, if claimed; its forks belong to it too."""

_before: dict[str, str | None] = {}
"""Previous values of the variables that `claim` sets."""


def cache_root(environ: Mapping[str, str] | None = None) -> tuple[Path, str]:
    """Return the directory below which hf_xet creates one for each store, and the variable that sets it.

    Args:
        environ: Environment; by default that of the process.
    """
    env = os.environ if environ is None else environ
    for variable, below in _PLACES:
        if variable in env:  # an empty value too, which means the working directory
            return Path(env[variable], *below), variable
    return Path(env.get("HOME") or _passwd_home(), ".cache", "huggingface", "xet"), "HOME"


def _passwd_home() -> str:
    import pwd  # noqa: PLC0415 - not available on every platform

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"


def why_not(root: Path) -> str | None:
    """Return why a directory cannot be created and written to; None if it can. Creates it, as hf_xet would."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    if os.access(root, os.W_OK | os.X_OK):
        return None
    return os.strerror(errno.EROFS if os.statvfs(root).f_flag & os.ST_RDONLY else errno.EACCES)


def claim() -> None:
    """Declare this process to be a command or actor of this package, before hf_xet is imported.

    hf_xet's logs then go to the package's own directory, unless `HF_XET_LOG_DEST` is set. Variables that are set but
    empty, as in compose files, mean the working directory to hf_xet and huggingface_hub; they are treated as unset.
    """
    _ours[:] = [os.getpid()]
    for variable in (_CACHE, _LOG):
        _before.setdefault(variable, os.environ.get(variable))
    for variable in (*(name for name, _ in _PLACES), _LOG):
        if os.environ.get(variable) == "":
            del os.environ[variable]
    home = cache_root()[0]
    if not os.environ.get(_LOG):
        if (directory := _own_directory(default_root(), _LOG_NAME)) is not None:
            os.environ[_LOG] = f"{directory}/"
        elif why_not(home / "logs") is not None:  # otherwise hf_xet would write its log to stderr
            os.environ[_LOG] = os.devnull
    if why_not(home) is not None:
        _move(default_root())


def begin() -> None:
    """Start a command: see `claim` and `keep_stdout`. Call before anything imports hf_xet."""
    keep_stdout()
    claim()


def started_with(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the changes of `claim`, as an engine with the same environment finds it."""
    before = {name: value for name, value in _before.items() if value is not None}
    return {name: value for name, value in environ.items() if name not in _before} | before


def is_ours() -> bool:
    """Return whether `claim` was called."""
    return bool(_ours)


def expect_usable(directory: Path | None = None) -> None:
    """Check, before a session is opened, that hf_xet can create its directories.

    Args:
        directory: `download_tmp_dir`; a process of this package moves hf_xet's root there if necessary.

    Raises:
        ConfigError: hf_xet cannot create them.
    """
    with _lock:
        root, variable = cache_root()
        if (why := why_not(root)) is None:
            return
        if is_ours() and any(_move(place) for place in (default_root(), directory and _below(directory)) if place):
            return
    which = _CACHE if variable == _CACHE else f"{_CACHE} or HF_HOME"  # the first takes precedence over the second
    raise ConfigError(
        f"hf_xet cannot write to {str(root)!r} ({variable}): {why}; set {which} to a directory that this user may write to"
    )


def _below(directory: Path) -> Path:
    """Return this user's directory below one that several users may share."""
    return directory if directory == default_root() else directory / default_root().name


def _move(place: Path) -> bool:
    """Move hf_xet's root to a directory of this package; only for processes of this package."""
    if (directory := _own_directory(place, _ROOT_NAME)) is None:
        return False
    os.environ[_CACHE] = str(directory)
    return True


def _own_directory(root: Path, name: str) -> Path | None:
    """Create a directory for all processes of this user; return None if that fails or another user may own it.

    Args:
        root: Directory whose name contains the user's id.
        name: Name of the directory in it.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for directory in (root, root / name):
            directory.mkdir(mode=0o700, exist_ok=True)
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
    except OSError:
        return None
    return root / name if os.access(root / name, os.W_OK | os.X_OK) else None


def keep_stdout() -> None:
    """Reserve stdout for `sys.stdout`, and send what native code writes to file descriptor 1 to stderr.

    hf_xet writes log lines there if it cannot open its log, and programs expect a single line of JSON on stdout.
    """
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):  # replaced by a test
        return
    try:
        if out.fileno() != 1:
            return
        out.flush()
        own = os.dup(1)
    except (OSError, ValueError):  # stdout is closed
        return
    try:
        os.dup2(2, 1)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    sys.stdout = io.TextIOWrapper(
        io.FileIO(own, "w") if out.write_through else io.BufferedWriter(io.FileIO(own, "w")),
        encoding=out.encoding,
        errors=out.errors,
        newline=None,
        line_buffering=out.line_buffering,
        write_through=out.write_through,
    )
