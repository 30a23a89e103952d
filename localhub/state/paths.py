"""Validation of paths in buckets."""

MAX_PATH_BYTES = 1024
"""Longest path in UTF-8, as in other object stores."""


class PathError(ValueError):
    """A bucket cannot hold a file at this path; the message gives the reason."""


def check_path(path: str) -> None:
    """Refuse a path that is empty, too long, not valid Unicode, or that leads elsewhere as a local path.

    Raises:
        PathError: the path is refused.
    """
    try:
        length = len(path.encode())
    except UnicodeEncodeError as error:
        raise PathError("the path is not valid Unicode") from error
    if length > MAX_PATH_BYTES:
        raise PathError(f"the path is {length} bytes long, the limit is {MAX_PATH_BYTES}")
    if "\0" in path:
        raise PathError("the path contains a NUL character")
    for segment in path.split("/"):
        if segment in {"", ".", ".."}:
            raise PathError(f"the path has a segment {segment!r}; paths must be relative and normalized")
