"""Byte formats of snapshots, journals and pointers of a key index; parsing rejects anything incomplete.

Snapshots and journals are NumPy `.npy` files, version 1.0, of a structured array
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html). Columns are found by name, and files may have
additional ones.

- A snapshot holds rows of `ROW`, sorted by digest.
- A journal holds rows of `JOURNAL`, in chronological order.
- The pointer is a JSON record (`Pointer`).

Completeness is checked by the Xet hash, which every reader compares (`hfbucket_plugin.index.store`).
"""

from __future__ import annotations

import io
import json
import mmap
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.hub.answers import MAX_SIZE
from hfbucket_plugin.index.access.stats import HIT, Span
from hfbucket_plugin.index.table import CHANGE, DELETED, HASH_BYTES, PUT, READ, ROW, Rows, Table

if TYPE_CHECKING:
    from typing import BinaryIO

Data = bytes | bytearray | mmap.mmap
"""Bytes of a file, in any kind of buffer."""

VERSION: Final = 1
"""Schema version. Readers reject pointers with a higher one. Columns may be added without a new version, but never
change."""

JOURNAL: Final = np.dtype(
    [
        ("digest_hi", "<u8"), ("digest_lo", "<u8"), ("size", "<u8"), ("xet_hash", "u1", (HASH_BYTES,)),
        ("age_ms", "<u4"), ("kind", "u1"),
    ]
)  # fmt: skip
"""Journal entry: the kind of change to a key (`PUT`, `DELETED`; readers skip other kinds), and its age in milliseconds
when the journal was written; `size` and `xet_hash` are 0 for a delete."""

ACCESS_JOURNAL: Final = np.dtype([*JOURNAL.descr, ("told", "<u4")])
"""Journal entry with hits (`stats`). For the kind `READ`, `size` is the number of hits of the key, the age is that of
the last one, and `told` is the Unix second of the first report, by the Hub's clock as the writer knows it; 0 for
other kinds. An entry of the kind `LOST`, with digest 0, means that the writer dropped `size` hits, with the age of
the last; older readers ignore it."""

MAX_POINTER_BYTES: Final = 64 * 1024

AHEAD_SECS: Final = 3600.0
"""Times further ahead of the Hub's clock, in seconds, are rejected, because readers would trust them for ever."""

_CHECKED_ROWS: Final = 100_000

_LAST_MOMENT: Final = 253402300799.0
"""End of the year 9999 in Unix seconds."""

_MOST_ROW_BYTES: Final = 1024
"""Maximum bytes of a snapshot's row, including columns of later versions; now 60, or 68 with heat."""

_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,200}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_HEADER_BYTES: Final = 64 * 1024
_PREAMBLE: Final = 10
"""Bytes before the header's text: magic, version, and the length of the text in 2 bytes, little-endian."""

_HEADER_ROOM: Final = 1024
"""Size in bytes of written headers: a multiple of 64, as the format requires, with room for more columns."""


def header_of(dtype: np.dtype[Any], rows: int) -> bytes:
    """Return the header of a file for writers that stream rows; its size does not depend on the number of rows."""
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)  # type: ignore[no-untyped-call] # NumPy gives it no types
    described = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(out, described)  # type: ignore[no-untyped-call] # same
    header = out.getvalue()
    text = header[_PREAMBLE:].rstrip().ljust(_HEADER_ROOM - _PREAMBLE - 1) + b"\n"
    return header[: _PREAMBLE - 2] + len(text).to_bytes(2, "little") + text


def to_bytes(rows: Rows) -> bytes:
    """Return rows as the bytes of a file."""
    return header_of(rows.dtype, len(rows)) + rows.tobytes()


class FormatError(IntegrityError):
    """A complete object does not belong to a key index, or has a version that is not supported."""


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Header of a file.

    Attributes:
        dtype: Type of the rows.
        rows: Number of rows.
        offset: Bytes before the first row.
    """

    dtype: np.dtype[Any]
    rows: int
    offset: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return self.offset + self.rows * self.dtype.itemsize


def read_header(file: BinaryIO, what: str) -> FileHeader:
    """Read the header of a file, leaving the file at its first row.

    Raises:
        FormatError: The header is invalid; the message names `what`.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call] # NumPy gives it no types
            raise ValueError("it is no .npy of version 1.0")  # noqa: TRY301 - one message for all errors
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call] # same
    except Exception as error:  # noqa: BLE001 - NumPy's parser may raise anything for garbage
        raise FormatError(f"{what}: no table of a key index: {error}") from None
    if fortran or len(shape) != 1 or dtype.hasobject or dtype.names is None:
        raise FormatError(f"{what}: no table of a key index: an array of another kind")
    return FileHeader(dtype, int(shape[0]), file.tell())


def _rows(data: Data, wanted: np.dtype[Any], what: str) -> Rows:
    """Return the rows of a file without a copy."""
    header = read_header(io.BytesIO(memoryview(data)[:_HEADER_BYTES]), what)
    check_columns(header, wanted, what)
    if header.file_bytes != len(data):
        raise FormatError(f"{what}: {len(data)} bytes, and its header promises {header.file_bytes}")
    return np.frombuffer(data, header.dtype, header.rows, header.offset)


def check_columns(header: FileHeader, wanted: np.dtype[Any], what: str) -> None:
    """Check that a file has the wanted columns with their types.

    Raises:
        FormatError: A column is missing or has another type.
    """
    for name in wanted.names or ():
        if name not in (header.dtype.names or ()) or header.dtype[name] != wanted[name]:
            raise FormatError(f"{what}: no table of a key index that this version reads: column {name!r}")


def check_snapshot(header: FileHeader, pointer: Pointer, what: str) -> None:
    """Check by the header that a file is the snapshot that a pointer names.

    Raises:
        FormatError: It is not.
    """
    check_columns(header, ROW, what)
    if header.file_bytes != pointer.size:
        raise FormatError(f"{what}: {pointer.size} bytes, and its header promises {header.file_bytes}")
    if header.rows != pointer.keys:
        raise FormatError(f"{what}: {header.rows} keys, and its pointer says {pointer.keys}")


def check_order(rows: Rows, what: str) -> None:
    """Check the order of rows for a `Table`, in blocks, because they may be on disk.

    Raises:
        FormatError: They are not sorted by digest, or a digest occurs twice.
    """
    try:
        for start in range(0, len(rows), _CHECKED_ROWS):
            Table(rows[max(0, start - 1) : start + _CHECKED_ROWS])
    except ValueError as error:
        raise FormatError(f"{what}: {error}") from None


def snapshot_of(data: Data, what: str) -> Table:
    """Return the table of a snapshot, backed by the given bytes.

    Raises:
        FormatError: The bytes are not a snapshot.
    """
    try:
        return Table(_rows(data, ROW, what))
    except ValueError as error:
        raise FormatError(f"{what}: {error}") from None


def changes_of(data: Data, written_at: float, what: str) -> Rows:
    """Return the changes in a journal, without entries of unknown kinds.

    Args:
        data: Content of the file.
        written_at: Upload time in Unix seconds, from which the entries' ages count.
        what: Name of the file, for errors.

    Raises:
        FormatError: It is not a journal.
    """
    entries = _rows(data, JOURNAL, what)
    entries = entries[(entries["kind"] == PUT) | (entries["kind"] == DELETED)]
    rows = np.zeros(len(entries), CHANGE)
    for name in ("digest_hi", "digest_lo", "size", "xet_hash", "kind"):
        rows[name] = entries[name]
    rows["at"] = written_at - entries["age_ms"] / 1000
    return rows


def hits_of(data: Data, written_at: float, writer: int, what: str, kind: int = READ) -> Rows:
    """Return the hits in a journal as rows of `HIT`; empty for a journal without that column.

    Args:
        data: Content of the file.
        written_at: Upload time in Unix seconds.
        writer: Writer of the journal.
        what: Name of the file, for errors.
        kind: `READ`, or `LOST` for hits that the writer dropped, with digest 0.

    Raises:
        FormatError: It is not a journal.
    """
    entries = _rows(data, JOURNAL, what)
    if "told" not in (entries.dtype.names or ()) or entries.dtype["told"] != ACCESS_JOURNAL["told"]:
        return np.zeros(0, HIT)
    entries = entries[entries["kind"] == kind]
    rows = np.zeros(len(entries), HIT)
    for name in ("digest_hi", "digest_lo", "told"):
        rows[name] = entries[name]
    rows["hits"], rows["writer"] = entries["size"], writer
    rows["at"] = written_at - entries["age_ms"] / 1000
    return rows


@dataclass(frozen=True, slots=True)
class Pointer:
    """Pointer to the current snapshot. Times are in Unix seconds by the Hub's clock.

    Attributes:
        snapshot: Name of its object, below `index/snapshots/`.
        xet_hash: Xet hash of the snapshot.
        size: Size of the snapshot in bytes.
        keys: Number of rows.
        covers: Journals uploaded before this time are included.
        listed: Changes made before this time are included, or stay unknown until the next listing, because readers skip
            older entries of later journals. `listed <= covers`.
        full: Start of the listing that the snapshot goes back to. All changes before it are included, with or without a
            journal. `full <= listed`.
        version: Schema version.
        heat_since: Start of the recording of hits; 0 without one. See `stats.Span` for this and the next two fields.
        heat_until: Reports of hits before this time are counted.
        heat_told: Time of the last report.
        heat_lost: Number of hits that recorders dropped since hits were first recorded without a gap.
        heat_lost_at: Time of the last dropped hit; 0 for none. Hits are completely known only since then, so
            `heat_since`, which older versions also use, is never earlier.
    """

    snapshot: str
    xet_hash: str
    size: int
    keys: int
    covers: float
    listed: float
    full: float
    version: int = VERSION
    heat_since: float = 0.0
    heat_until: float = 0.0
    heat_told: float = 0.0
    heat_lost: int = 0
    heat_lost_at: float = 0.0

    @property
    def heat(self) -> Span:
        """Return the period for which heat is known."""
        return Span(self.heat_since, self.heat_until, self.heat_told, self.heat_lost, self.heat_lost_at)

    def ahead_of(self, now: float) -> str:
        """Return which of its times is ahead of `now` by more than `AHEAD_SECS`, as text; empty if none is.

        Args:
            now: Time of the Hub in Unix seconds.
        """
        for name in ("covers", "listed", "full", "heat_since", "heat_until", "heat_told", "heat_lost_at"):
            at = getattr(self, name)
            if at > now + AHEAD_SECS:
                return f"its {name} ({at:.0f}) is {(at - now) / 3600:,.1f} h ahead of the Hub's clock"
        return ""

    @property
    def content(self) -> ContentId:
        """Content of the snapshot."""
        return ContentId(self.xet_hash, self.size)

    def to_bytes(self) -> bytes:
        """Return the pointer as the bytes of its object."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def parse(cls, data: Data, what: str) -> Pointer:
        """Parse the pointer's object, ignoring unknown fields.

        Raises:
            FormatError: It is not a pointer, or has a later version.
        """
        try:
            record = json.loads(bytes(data))
            if not isinstance(record, dict):
                raise TypeError("no JSON record")  # noqa: TRY301 - one message for all errors
            version = _whole(record["version"])
            if version > VERSION:
                raise ValueError(f"of version {version}, and this one reads {VERSION} at most: upgrade")  # noqa: TRY301
            pointer = cls(
                snapshot=str(record["snapshot"]),
                xet_hash=str(record["xet_hash"]),
                size=_whole(record["size"]),
                keys=_whole(record["keys"]),
                covers=_moment(record["covers"]),
                listed=_moment(record["listed"]),
                full=_moment(record["full"]),
                version=version,
                heat_lost=_whole(record.get("heat_lost", 0)),
                **{
                    name: _moment(record.get(name, 0.0))
                    for name in ("heat_since", "heat_until", "heat_told", "heat_lost_at")
                },
            )
            if not _NAME.fullmatch(pointer.snapshot) or not _HASH.fullmatch(pointer.xet_hash):
                raise ValueError("its snapshot has no name or no hash")  # noqa: TRY301
            if pointer.size > _HEADER_BYTES + pointer.keys * _MOST_ROW_BYTES:
                raise ValueError(f"no snapshot of {pointer.keys} keys has {pointer.size} bytes")  # noqa: TRY301
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise FormatError(f"{what}: no pointer to a key index: {type(error).__name__}: {error}") from None
        return pointer


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
        raise ValueError(f"{value!r} is not a valid count")
    return value


def _moment(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LAST_MOMENT:
        raise ValueError(f"{value!r} is not a valid time")
    return float(value)
