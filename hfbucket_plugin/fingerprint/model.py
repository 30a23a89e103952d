"""Fingerprints: the properties of KV chunks that keys do not contain, such as weights, chunking, hashing and layout.

A key contains only the model, the worker and a hash. Fingerprints distinguish fleets whose keys can be equal although
their chunks differ, or whose keys differ although their prompts are equal.

Engines whose keys cannot be equal never conflict: the mode, the world size and, in classic keys, the dtype are parts of
the key. They form the *space* of a fingerprint, and fingerprints are compared only within one space.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hfbucket_plugin.core import texts
from hfbucket_plugin.errors import IntegrityError


class NewerError(IntegrityError):
    """A later release wrote the object: it is not damaged, and must not be overwritten."""


SCHEMA: Final = 1
"""Schema version of the objects. A newer one is not read, because its meaning is unknown."""

MAX_VARIANTS: Final = 64
"""Maximum number of spaces of one model, that is, of its world sizes and dtypes."""

_Text = Annotated[str, Field(min_length=1, max_length=512)]
_Count = Annotated[int, Field(ge=0, le=2**48)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a later release may add fields


class LayerGroup(_Model):
    """Layers that are stored together with the same layout.

    Attributes:
        shape: Shape of a full chunk as LMCache allocates it: KV kinds (2, or 1 with MLA), layers, tokens, hidden size.
        dtype: PyTorch's name without `torch.`.
        object_group: Object group of MP mode, a part of the key; 0 in classic keys.
    """

    shape: Annotated[tuple[_Count, ...], Field(min_length=1, max_length=16)]
    dtype: _Text
    object_group: _Count = 0

    def __str__(self) -> str:
        own = f"{'x'.join(map(str, self.shape))} {self.dtype}"
        return f"group {self.object_group}: {own}" if self.object_group else own

    @property
    def kind(self) -> tuple[int, int] | None:
        """Return KV kinds and tokens, which all pipeline stages share; None for a shape without such dimensions."""
        return (self.shape[0], self.shape[2]) if len(self.shape) >= _LAYERED else None


_LAYERED: Final = 4
_MAX_GROUPS: Final = 256
MAX_WORKERS: Final = 1024
"""Maximum number of workers of one engine with recorded layouts; further ones are not compared."""


class ChunkLayout(_Model):
    """Layout of a full chunk of one worker.

    Attributes:
        groups: Layer groups, in order.
        worker: Number of the worker; None if all workers have the same layout, as in MP mode.
    """

    groups: Annotated[tuple[LayerGroup, ...], Field(min_length=1, max_length=_MAX_GROUPS)]
    worker: _Count | None = None

    def __str__(self) -> str:
        return ", ".join(map(str, self.groups))

    def fits(self, other: ChunkLayout) -> bool:
        """Return whether chunks of both layouts can be the same.

        Keys of MP mode name the object group, so only groups that both know are compared. Classic keys name the worker,
        which is compared with itself. Different workers may be pipeline stages with other numbers of layers, heads and
        groups; they must share only the KV kind and the tokens of a chunk.
        """
        if self.worker is None and other.worker is None:
            mine, theirs = self._by_object_group(), other._by_object_group()
            return all(mine[index] == theirs[index] for index in mine.keys() & theirs.keys())
        if self.worker == other.worker:
            return self.groups == other.groups
        kinds, others = ({group.kind for group in one.groups} - {None} for one in (self, other))
        return not kinds or not others or bool(kinds & others)

    def completed(self, other: ChunkLayout) -> ChunkLayout:
        """Return this layout with the object groups that only the other has, if the two fit."""
        known = self._by_object_group()
        new = [group for group in other.groups if group.object_group not in known]
        if not new or self.worker is not None or other.worker is not None or len(self.groups) + len(new) > _MAX_GROUPS:
            return self
        return ChunkLayout(groups=tuple(sorted((*self.groups, *new), key=lambda group: group.object_group)))

    def _by_object_group(self) -> dict[int, list[LayerGroup]]:
        found: dict[int, list[LayerGroup]] = {}
        for group in self.groups:
            found.setdefault(group.object_group, []).append(group)
        return found


class Space(NamedTuple):
    """Set of engines whose keys can be equal.

    Attributes:
        mode: Mode of the engine; keys of the two modes are never equal.
        world_size: Number of workers in keys.
        local_world_size: Number of workers of a node; only in keys of MP mode.
        dtype: Name of the dtype in keys; only in classic keys.
    """

    mode: str
    world_size: int
    local_world_size: int | None
    dtype: str | None

    def __str__(self) -> str:
        local = f", {self.local_world_size} a node" if self.local_world_size not in (None, self.world_size) else ""
        return f"{self.mode}, world size {self.world_size}{local}" + (f", {self.dtype}" if self.dtype else "")


class Fingerprint(_Model):
    """Known properties of the KV cache that one engine stores and expects. Unknown ones are None and not compared.

    Attributes:
        mode: `classic` or `mp`: kind of key.
        model: Model name in keys.
        world_size: Number of workers in keys: 1 if all workers share what the first one stores (MLA).
        local_world_size: Number of workers of a node; MP mode only.
        dtype: Name of the KV dtype in classic keys; MP keys have none.
        model_revision: Revision of the weights, from the setting `model_revision`.
        chunk_size: Tokens of a full chunk.
        layout: Layout of a full chunk; in a record, that of the worker that recorded it first.
        layouts: In a record: layouts of the other workers, ordered by worker. Releases that do not know the field
            ignore it.
        hash_algorithm: Algorithm that the engine is configured with.
        hash_check: LMCache's hash of a fixed sequence of tokens, in hexadecimal: equal if algorithm and seed are.
        hash_bytes: Number of bytes of a chunk's hash; MP mode only.
        hash_seed_pinned: Whether PYTHONHASHSEED was a number.
        lmcache_version: Installed version of LMCache.
        written_by: Product, version and host of the writer.
        recorded_at: Time of the record, by the writer's clock.
    """

    mode: Literal["classic", "mp"]
    model: _Text
    world_size: _Count
    local_world_size: _Count | None = None
    dtype: _Text | None = None
    model_revision: _Text | None = None
    chunk_size: _Count | None = None
    layout: ChunkLayout | None = None
    layouts: Annotated[tuple[ChunkLayout, ...], Field(max_length=MAX_WORKERS)] = ()
    hash_algorithm: _Text | None = None
    hash_check: _Text | None = None
    hash_bytes: _Count | None = None
    hash_seed_pinned: bool | None = None
    lmcache_version: _Text | None = None
    written_by: _Text | None = None
    recorded_at: datetime | None = None

    @model_validator(mode="after")
    def _workers_are_distinct(self) -> Self:
        if self.layouts:
            workers = [one.worker for one in self._all_layouts()]
            if self.layout is None or None in workers or len(set(workers)) < len(workers):
                raise ValueError("each layout must name a worker of its own")
        return self

    @property
    def space(self) -> Space:
        """Set of engines whose keys can equal this engine's."""
        return Space(self.mode, self.world_size, self.local_world_size, self.dtype)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of everything that is compared, without writer, time and versions."""
        compared = {name: getattr(self, name) for name in ("model", *COMPARED)}
        compared["layout"] = None if self.layout is None else self.layout.model_dump(mode="json", exclude={"worker"})
        if self.layouts:
            compared["layouts"] = [one.model_dump(mode="json") for one in self.layouts]
        text = json.dumps([*self.space, compared], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def completed(self, other: Fingerprint) -> Self:
        """Return this fingerprint with what only the other knows, if the two do not differ."""
        missing = {
            name: value
            for name in (*COMPARED, "hash_seed_pinned")
            if getattr(self, name) is None and (value := getattr(other, name)) is not None
        }
        return self.model_copy(update=missing | self._completed_layouts(other))

    def _completed_layouts(self, other: Fingerprint) -> dict[str, Any]:
        """Return the layouts of both, each worker's once; known ones do not change."""
        if self.layout is None:
            return {"layout": other.layout, "layouts": other.layouts}
        first, more = self.layout, {one.worker: one for one in self.layouts}
        for layout in other._all_layouts():
            if layout.worker == first.worker:
                first = first.completed(layout)
            elif layout.worker is not None and first.worker is not None and len(more) < MAX_WORKERS:
                more.setdefault(layout.worker, layout)
        return {"layout": first, "layouts": tuple(more[worker] for worker in sorted(more, key=lambda one: one or 0))}

    def _all_layouts(self) -> tuple[ChunkLayout, ...]:
        return self.layouts if self.layout is None else (self.layout, *self.layouts)

    def layout_beside(self, layout: ChunkLayout) -> ChunkLayout | None:
        """Return the layout to compare with: that of the same worker, or else that of the first recorded worker."""
        return next((one for one in self._all_layouts() if one.worker == layout.worker), self.layout)

    def facts(self) -> dict[str, str]:
        """Return the known properties as text, by field."""
        names = (*COMPARED, "hash_seed_pinned", "lmcache_version", "written_by", "recorded_at")
        return {name: _word(getattr(self, name)) for name in names if getattr(self, name) is not None}


COMPARED: Final = ("model_revision", "chunk_size", "layout", "hash_algorithm", "hash_check", "hash_bytes")
"""Fields in which two engines of one space must not differ."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Field in which two fingerprints of a space differ.

    Attributes:
        field: Name, one of `COMPARED`.
        recorded: Value in the bucket, as text.
        here: Value of this engine, as text.
    """

    field: str
    recorded: str
    here: str

    def __str__(self) -> str:
        return self.words("here")

    def words(self, where: str) -> str:
        """Return the difference as text; `where` names the place of the other value."""
        what = "hash_check (the seed, PYTHONHASHSEED)" if self.field == "hash_check" else self.field
        return f"{what} is {self.recorded} in the bucket and {self.here} {where}"


def differences(recorded: Fingerprint, here: Fingerprint) -> list[Difference]:
    """Return all differences between two engines that would use the same keys; empty for other spaces or models.

    Only properties known to both are compared. If the values of `hash_check` are known and equal, the names of the
    algorithms do not matter.
    """
    if recorded.space != here.space or recorded.model != here.model:
        return []
    return [
        Difference(name, _word(_beside(name, recorded, here)), _word(getattr(here, name)))
        for name in COMPARED
        if not _agree(name, recorded, here)
    ]


def _beside(name: str, recorded: Fingerprint, here: Fingerprint) -> Any:
    """Return the recorded value that a field of an engine is compared with."""
    if name == "layout" and here.layout is not None:
        return recorded.layout_beside(here.layout)
    return getattr(recorded, name)


def _agree(name: str, recorded: Fingerprint, here: Fingerprint) -> bool:
    theirs, mine = _beside(name, recorded, here), getattr(here, name)
    if mine is None or theirs is None or mine == theirs:
        return True
    if name == "hash_algorithm":
        return recorded.hash_check is not None and recorded.hash_check == here.hash_check
    if isinstance(mine, ChunkLayout) and isinstance(theirs, ChunkLayout):
        return mine.fits(theirs)
    return False


printable = texts.printable


def _word(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return printable({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))


def as_text(found: list[Difference], where: str = "here") -> str:
    """Return differences in one line; see `Difference.words`."""
    return "; ".join(one.words(where) for one in found)


class Record(_Model):
    """Record of one model in a bucket: a fingerprint for each space.

    Attributes:
        model: Name of the model.
        variants: Fingerprints, one for each space.
    """

    model: _Text
    variants: Annotated[tuple[Fingerprint, ...], Field(max_length=MAX_VARIANTS)] = ()

    def of(self, space: Space) -> Fingerprint | None:
        """Return the fingerprint of a space, if there is one."""
        return next((variant for variant in self.variants if variant.space == space), None)

    def having(self, fingerprint: Fingerprint) -> Record:
        """Return the record with a fingerprint added, or replacing that of its space."""
        others = tuple(variant for variant in self.variants if variant.space != fingerprint.space)
        return Record(model=self.model, variants=(*others, fingerprint))

    def to_json(self) -> bytes:
        """Return the bytes of the record's object."""
        return _to_json({"schema": SCHEMA, "model": self.model, "variants": [_plain(one) for one in self.variants]})

    @classmethod
    def from_json(cls, data: bytes, model: str, where: str) -> Record:
        """Parse the object of a model's record.

        Raises:
            IntegrityError: It is not a record of this model; `NewerError` for a newer schema.
        """
        record = _read(cls, data, where)
        if record.model != model or any(one.model != model for one in record.variants):
            raise IntegrityError(f"{where}: is the fingerprint of {record.model!r}, not of {model!r}")
        if len({one.space for one in record.variants}) < len(record.variants):
            raise IntegrityError(f"{where}: holds two fingerprints of the same mode, world size and dtype")
        return record


class FingerprintClaim(_Model):
    """Fingerprint of one engine, in an object of its own.

    Attributes:
        fingerprint: Fingerprint of the engine.
    """

    fingerprint: Fingerprint

    @staticmethod
    def to_json(fingerprint: Fingerprint) -> bytes:
        """Return the bytes of a claim's object."""
        return _to_json({"schema": SCHEMA, "fingerprint": _plain(fingerprint)})

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Fingerprint:
        """Parse a claim's object.

        Raises:
            IntegrityError: It is not a fingerprint, or has a newer schema.
        """
        return _read(cls, data, where).fingerprint


def _plain(fingerprint: Fingerprint) -> dict[str, Any]:
    return fingerprint.model_dump(mode="json", exclude_none=True)


def _to_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode()


_Kind = TypeVar("_Kind", Record, FingerprintClaim)


def _read(kind: type[_Kind], data: bytes, where: str) -> _Kind:
    try:
        document = json.loads(data)
        if isinstance(document, dict) and document.get("schema", SCHEMA) != SCHEMA:
            raise NewerError(
                f"{where}: is of version {printable(str(document['schema'])[:20])}, and this release knows {SCHEMA}: "
                "install the release that wrote it"
            )
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise IntegrityError(f"{where}: not a valid fingerprint: {printable(place)}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{where}: not a valid fingerprint: not JSON") from None
