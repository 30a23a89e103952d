"""Where hf_xet writes, and what is said of it where it cannot.

hf_xet's sessions keep files, and make a directory for each store below a root that only the environment names. Sessions
of ours keep their files in a directory of ours (`SessionPool`). The root stays: inside an engine of other people the environment is
not ours to change, so a root that cannot be written is an error that names it; in a process of our own, such as a command,
the root and the logs move to a directory of ours. Imports no hf_xet: it opens its log when it is imported.
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
"""The process that is ours, if it is: a fork of it is, too."""

_before: dict[str, str | None] = {}
"""What `claim` found in the variables that it sets."""


def cache_root(environ: Mapping[str, str] | None = None) -> tuple[Path, str]:
    """Return the directory below which hf_xet makes one for each store, and the variable that says so.

    Args:
        environ: The environment; that of the process by default.
    """
    env = os.environ if environ is None else environ
    for variable, below in _PLACES:
        if variable in env:  # an empty one too: it is then the working directory
            return Path(env[variable], *below), variable
    return Path(env.get("HOME") or _passwd_home(), ".cache", "huggingface", "xet"), "HOME"


def _passwd_home() -> str:
    import pwd  # noqa: PLC0415 - it is not there on every platform

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"


def why_not(root: Path) -> str | None:
    """Return why a directory cannot be made and written to, in words; None where it can. Makes it, as hf_xet would."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    if os.access(root, os.W_OK | os.X_OK):
        return None
    return os.strerror(errno.EROFS if os.statvfs(root).f_flag & os.ST_RDONLY else errno.EACCES)


def claim() -> None:
    """Declare this process to be one of our own commands or actors, before hf_xet is imported.

    hf_xet's logs then go to a directory of ours, unless `HF_XET_LOG_DEST` says where to. Variables that are set and empty, as
    compose files make them, mean the working directory to it and to huggingface_hub: they are taken for not set.
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
        elif why_not(home / "logs") is not None:  # else it would fill stderr
            os.environ[_LOG] = os.devnull
    if why_not(home) is not None:
        _move(default_root())


def begin() -> None:
    """Begin a command: see `claim` and `keep_stdout`. To be called before anything imports hf_xet."""
    keep_stdout()
    claim()


def started_with(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what `claim` changed in it: what an engine that is started like this finds."""
    before = {name: value for name, value in _before.items() if value is not None}
    return {name: value for name, value in environ.items() if name not in _before} | before


def is_ours() -> bool:
    """Return whether `claim` was called."""
    return bool(_ours)


def expect_usable(directory: Path | None = None) -> None:
    """See to it that hf_xet can make its directories, before a session is asked for.

    Args:
        directory: `download_tmp_dir`: a process of our own moves hf_xet's root there if it must.

    Raises:
        ConfigError: It cannot.
    """
    with _lock:
        root, variable = cache_root()
        if (why := why_not(root)) is None:
            return
        if is_ours() and any(_move(place) for place in (default_root(), directory and _below(directory)) if place):
            return
    which = _CACHE if variable == _CACHE else f"{_CACHE} or HF_HOME"  # the first goes before the second
    raise ConfigError(
        f"hf_xet cannot write to {str(root)!r} ({variable}): {why}; set {which} to a directory that this user may write to"
    )


def _below(directory: Path) -> Path:
    """The directory of this user's below one that several may share."""
    return directory if directory == default_root() else directory / default_root().name


def _move(place: Path) -> bool:
    """Have hf_xet take a directory of ours for its root; for processes of our own."""
    if (directory := _own_directory(place, _ROOT_NAME)) is None:
        return False
    os.environ[_CACHE] = str(directory)
    return True


def _own_directory(root: Path, name: str) -> Path | None:
    """A directory of this user's, for all its processes; None where it cannot be made, or could be another's.

    Args:
        root: A directory that bears the user's id.
        name: Of the directory in it.
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
    """Keep stdout for `sys.stdout`, and send what native code writes to file descriptor 1 to stderr.

    hf_xet writes log lines there when its log cannot be opened, and stdout is an interface: one line of JSON for programs.
    """
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):  # a test's
        return
    try:
        if out.fileno() != 1:
            return
        out.flush()
        own = os.dup(1)
    except (OSError, ValueError):  # it is closed
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
