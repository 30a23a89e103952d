"""Snapshots, journals and pointers of a key index as bytes. Pure, and strict: what is not whole is refused.

Snapshots and journals are NumPy's own `.npy` files, version 1.0, of a structured array
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html): `numpy.load` reads them, on any machine, and so
does what follows the public description of the format, a text header that names each column with its type and raw rows
after it. Columns are found by name, so files may have more of them than a reader knows.

- a snapshot: rows of `ROW`, sorted by digest;
- a journal: rows of `JOURNAL`, in the order in which things happened;
- the pointer: a JSON record (`Pointer`).

What is whole is told by the Xet hash, which every reader compares (`index_store`).
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
"""The bytes of a file, wherever they lie."""

VERSION: Final = 1
"""Of the schema. A reader refuses a pointer of a higher one: columns may be added without it, and never change."""

JOURNAL: Final = np.dtype(
    [
        ("digest_hi", "<u8"), ("digest_lo", "<u8"), ("size", "<u8"), ("xet_hash", "u1", (HASH_BYTES,)),
        ("age_ms", "<u4"), ("kind", "u1"),
    ]
)  # fmt: skip
"""One entry of a journal: what happened to a key (`PUT`, `DELETED`; other kinds are for others, and passed over), how many
milliseconds before the journal was written; 0 in `size` and `xet_hash` where it was deleted."""

ACCESS_JOURNAL: Final = np.dtype([*JOURNAL.descr, ("told", "<u4")])
"""The same with entries of the kind `READ` among them (`heat`): `size` is how many hits a key had, the age that of the last one, and
`told` the second since 1970 by the Hub's clock, as the writer knows it, at which that was told first; 0 for other kinds. An entry of the kind `LOST`, of the digest 0, says that the writer dropped `size` hits, the
last one so long ago; readers that do not know that kind ignore it."""

MAX_POINTER_BYTES: Final = 64 * 1024

AHEAD_SECS: Final = 3600.0
"""A time that is later than the Hub's clock by more is refused: who goes by it would believe it for ever."""

_CHECKED_ROWS: Final = 100_000

_LAST_MOMENT: Final = 253402300799.0
"""The end of the year 9999, in seconds since 1970."""

_MOST_ROW_BYTES: Final = 1024
"""Of a snapshot's row, with the columns of later versions: it has 60, or 68 with heat."""

_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,200}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_HEADER_BYTES: Final = 64 * 1024
_PREAMBLE: Final = 10
"""Magic, version, and the length of the header's text in 2 bytes, little-endian."""

_HEADER_ROOM: Final = 1024
"""Bytes of a header that we write: a multiple of 64, as the format asks for, with room for more columns."""


def header_of(dtype: np.dtype[Any], rows: int) -> bytes:
    """The first bytes of a file of so many rows, for writers that stream them: as many whatever the number of rows is."""
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)  # type: ignore[no-untyped-call] # NumPy gives it no types
    described = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(out, described)  # type: ignore[no-untyped-call] # same
    header = out.getvalue()
    text = header[_PREAMBLE:].rstrip().ljust(_HEADER_ROOM - _PREAMBLE - 1) + b"\n"
    return header[: _PREAMBLE - 2] + len(text).to_bytes(2, "little") + text


def to_bytes(rows: Rows) -> bytes:
    """Rows as a file."""
    return header_of(rows.dtype, len(rows)) + rows.tobytes()


class FormatError(IntegrityError):
    """An object is, whole as it is, none of a key index; or one of a version that this one does not read."""


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What the header of a file says.

    Attributes:
        dtype: Of its rows.
        rows: How many there are.
        offset: Bytes before the first one.
    """

    dtype: np.dtype[Any]
    rows: int
    offset: int

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.offset + self.rows * self.dtype.itemsize


def read_header(file: BinaryIO, what: str) -> FileHeader:
    """Read the header of a file, and leave it at its first row.

    Raises:
        FormatError: It has none of ours; the message names `what`.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call] # NumPy gives it no types
            raise ValueError("it is no .npy of version 1.0")  # noqa: TRY301 - one message for all that may be wrong
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call] # same
    except Exception as error:  # noqa: BLE001 - garbage makes NumPy's parser raise whatever it likes
        raise FormatError(f"{what}: no table of a key index: {error}") from None
    if fortran or len(shape) != 1 or dtype.hasobject or dtype.names is None:
        raise FormatError(f"{what}: no table of a key index: an array of another kind")
    return FileHeader(dtype, int(shape[0]), file.tell())


def _rows(data: Data, wanted: np.dtype[Any], what: str) -> Rows:
    """The rows of a file, without a copy."""
    header = read_header(io.BytesIO(memoryview(data)[:_HEADER_BYTES]), what)
    check_columns(header, wanted, what)
    if header.file_bytes != len(data):
        raise FormatError(f"{what}: {len(data)} bytes, and its header promises {header.file_bytes}")
    return np.frombuffer(data, header.dtype, header.rows, header.offset)


def check_columns(header: FileHeader, wanted: np.dtype[Any], what: str) -> None:
    """Make sure that a file has the columns that are wanted, of their types.

    Raises:
        FormatError: One is missing, or of another type.
    """
    for name in wanted.names or ():
        if name not in (header.dtype.names or ()) or header.dtype[name] != wanted[name]:
            raise FormatError(f"{what}: no table of a key index that this version reads: column {name!r}")


def check_snapshot(header: FileHeader, pointer: Pointer, what: str) -> None:
    """Make sure that a file is, by its header, the snapshot that a pointer names: for every reader of snapshots.

    Raises:
        FormatError: It is not.
    """
    check_columns(header, ROW, what)
    if header.file_bytes != pointer.size:
        raise FormatError(f"{what}: {pointer.size} bytes, and its header promises {header.file_bytes}")
    if header.rows != pointer.keys:
        raise FormatError(f"{what}: {header.rows} keys, and its pointer says {pointer.keys}")


def check_order(rows: Rows, what: str) -> None:
    """Make sure that rows are as a reader's `Table` wants them, a block at a time: they may be on disk.

    Raises:
        FormatError: They are not in the order of their digests, or one is there twice.
    """
    try:
        for start in range(0, len(rows), _CHECKED_ROWS):
            Table(rows[max(0, start - 1) : start + _CHECKED_ROWS])
    except ValueError as error:
        raise FormatError(f"{what}: {error}") from None


def snapshot_of(data: Data, what: str) -> Table:
    """The table of a snapshot, over the very bytes.

    Raises:
        FormatError: They are no snapshot.
    """
    try:
        return Table(_rows(data, ROW, what))
    except ValueError as error:
        raise FormatError(f"{what}: {error}") from None


def changes_of(data: Data, written_at: float, what: str) -> Rows:
    """The changes that a journal tells of; entries of kinds that are not known are left out.

    Args:
        data: The file.
        written_at: When the Hub took it, in seconds since 1970: what its entries' ages count from.
        what: Names it in errors.

    Raises:
        FormatError: It is no journal.
    """
    entries = _rows(data, JOURNAL, what)
    entries = entries[(entries["kind"] == PUT) | (entries["kind"] == DELETED)]
    rows = np.zeros(len(entries), CHANGE)
    for name in ("digest_hi", "digest_lo", "size", "xet_hash", "kind"):
        rows[name] = entries[name]
    rows["at"] = written_at - entries["age_ms"] / 1000
    return rows


def hits_of(data: Data, written_at: float, writer: int, what: str, kind: int = READ) -> Rows:
    """The hits that a journal tells of, as rows of `HIT`; none for one without the column for them.

    Args:
        data: The file.
        written_at: When the Hub took it, in seconds since 1970.
        writer: Who wrote it.
        what: Names it in errors.
        kind: `READ`; or `LOST` for the hits that its writer dropped, whose digest is 0.

    Raises:
        FormatError: It is no journal.
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
    """Which snapshot is the present one.

    Attributes:
        snapshot: The name of its object, below `index/snapshots/`.
        xet_hash: Of the snapshot.
        size: Of the snapshot, in bytes.
        keys: Rows in it.
        covers: Seconds since 1970 by the Hub's clock: what journals told that the Hub took before then is in it.
        listed: The same: what happened to a key before then is in it, or nobody will know of it before the next listing: what
            later journals tell of earlier times is passed over. `listed <= covers`.
        full: The same: when the listing began that it goes back to. Everything that happened before is in it, whether a journal
            told of it or not. `full <= listed`.
        version: Of the schema.
        heat_since: Since when hits are recorded; 0 where they are not. See `heat.Span`, as for the two that follow.
        heat_until: Tells of hits before then are counted.
        heat_told: When the last tell was made.
        heat_lost: How many hits recorders dropped since hits were first recorded without a gap.
        heat_lost_at: When the last of them was; 0: none was. Hits are completely known since then only, so `heat_since`, by
            which older versions go too, is never earlier.
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
        """For how long heat is known."""
        return Span(self.heat_since, self.heat_until, self.heat_told, self.heat_lost, self.heat_lost_at)

    def ahead_of(self, now: float) -> str:
        """Which time of it is later than a moment by more than `AHEAD_SECS`, in words; empty where none is.

        Args:
            now: The Hub's time, in seconds since 1970.
        """
        for name in ("covers", "listed", "full", "heat_since", "heat_until", "heat_told", "heat_lost_at"):
            at = getattr(self, name)
            if at > now + AHEAD_SECS:
                return f"its {name} ({at:.0f}) is {(at - now) / 3600:,.1f} h ahead of the Hub's clock"
        return ""

    @property
    def content(self) -> ContentId:
        """The snapshot's."""
        return ContentId(self.xet_hash, self.size)

    def to_bytes(self) -> bytes:
        """As an object."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def parse(cls, data: Data, what: str) -> Pointer:
        """Read an object; fields that are not known are passed over.

        Raises:
            FormatError: It is no pointer, or one of a later version.
        """
        try:
            record = json.loads(bytes(data))
            if not isinstance(record, dict):
                raise TypeError("no JSON record")  # noqa: TRY301 - one message for all that may be wrong
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
