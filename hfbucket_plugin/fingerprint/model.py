"""What keys do not say of the KV below them: of which weights it is, cut how, hashed how, laid out how. Pure.

A key names the model, the worker and a hash, and nothing else. Two fleets whose keys can be equal, and whose chunks mean
different things, or whose keys differ although their prompts are equal, are told apart by their *fingerprints*.

Engines whose keys cannot be equal do not meet, whatever their fingerprints say: the mode, the world size, and in classic
keys the dtype are parts of the key. They make the *space* of a fingerprint; fingerprints are compared within one space.
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
"""Of the objects. A newer one is not read: what it means is not known here."""

MAX_VARIANTS: Final = 64
"""Spaces of one model: world sizes and dtypes that it is served with."""

_Text = Annotated[str, Field(min_length=1, max_length=512)]
_Count = Annotated[int, Field(ge=0, le=2**48)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a later release may say more


class LayerGroup(_Model):
    """Layers that are stored together and alike.

    Attributes:
        shape: Of a full chunk, as LMCache allocates it: KV kinds (2, or 1 with MLA), layers, tokens, hidden size of a token.
        dtype: As PyTorch names it, without `torch.`.
        object_group: MP mode's object group, a part of the key; 0 in classic keys.
    """

    shape: Annotated[tuple[_Count, ...], Field(min_length=1, max_length=16)]
    dtype: _Text
    object_group: _Count = 0

    def __str__(self) -> str:
        own = f"{'x'.join(map(str, self.shape))} {self.dtype}"
        return f"group {self.object_group}: {own}" if self.object_group else own

    @property
    def kind(self) -> tuple[int, int] | None:
        """KV kinds and tokens, which all stages of a pipeline share; None for a shape that has no such dimensions."""
        return (self.shape[0], self.shape[2]) if len(self.shape) >= _LAYERED else None


_LAYERED: Final = 4
_MAX_GROUPS: Final = 256
MAX_WORKERS: Final = 1024
"""Workers of one engine whose layouts are recorded side by side; those of further ones are not compared."""


class ChunkLayout(_Model):
    """How a full chunk of one worker is laid out.

    Attributes:
        groups: In their order.
        worker: Whose; None where all workers are known to have the same, as in MP mode.
    """

    groups: Annotated[tuple[LayerGroup, ...], Field(min_length=1, max_length=_MAX_GROUPS)]
    worker: _Count | None = None

    def __str__(self) -> str:
        return ", ".join(map(str, self.groups))

    def fits(self, other: ChunkLayout) -> bool:
        """Whether chunks of one can be chunks of the other.

        Where keys name the object group, chunks of different ones never meet: those that both know are compared. In classic
        keys the worker is named: a worker is compared with itself. Two different workers may be stages of a pipeline, with
        other numbers of layers, heads and groups; all that they must share is a kind of KV and the tokens of a chunk.
        """
        if self.worker is None and other.worker is None:
            mine, theirs = self._by_object_group(), other._by_object_group()
            return all(mine[index] == theirs[index] for index in mine.keys() & theirs.keys())
        if self.worker == other.worker:
            return self.groups == other.groups
        kinds, others = ({group.kind for group in one.groups} - {None} for one in (self, other))
        return not kinds or not others or bool(kinds & others)

    def completed(self, other: ChunkLayout) -> ChunkLayout:
        """This one, with the object groups that only the other knows; for two that fit."""
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
    """Whose keys can be equal.

    Attributes:
        mode: Of the engine; the two kinds of key never meet.
        world_size: Workers, as keys have it.
        local_world_size: Workers of a node; in keys of MP mode only.
        dtype: As keys spell it; in classic keys only.
    """

    mode: str
    world_size: int
    local_world_size: int | None
    dtype: str | None

    def __str__(self) -> str:
        local = f", {self.local_world_size} a node" if self.local_world_size not in (None, self.world_size) else ""
        return f"{self.mode}, world size {self.world_size}{local}" + (f", {self.dtype}" if self.dtype else "")


class Fingerprint(_Model):
    """What one engine knows of the KV that it stores and expects. What it does not know is None, and is not compared.

    Attributes:
        mode: `classic` or `mp`: which kind of key.
        model: The model's name, as keys have it.
        world_size: Workers, as keys have it: 1 where all workers share what the first one stores (MLA).
        local_world_size: Workers of a node; MP mode only.
        dtype: Of the KV, as classic keys spell it; MP keys have none.
        model_revision: Of the weights, as `model_revision` says.
        chunk_size: Tokens of a full chunk.
        layout: Of a full chunk; in a record, of the worker that recorded it first.
        layouts: In a record: of the other workers, ordered by worker. A release that does not know the field ignores it.
        hash_algorithm: As the engine was told it.
        hash_check: LMCache's own hash of a fixed sequence of tokens, in hexadecimal: equal where algorithm and seed are.
        hash_bytes: Bytes of a chunk's hash; MP mode only.
        hash_seed_pinned: Whether PYTHONHASHSEED was a number.
        lmcache_version: Of the installed LMCache.
        written_by: Product, version and host of who recorded it.
        recorded_at: When, by that host's clock.
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
        """Whose keys can be equal to this engine's."""
        return Space(self.mode, self.world_size, self.local_world_size, self.dtype)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all that is compared; who wrote it, when and with what is not."""
        compared = {name: getattr(self, name) for name in ("model", *COMPARED)}
        compared["layout"] = None if self.layout is None else self.layout.model_dump(mode="json", exclude={"worker"})
        if self.layouts:
            compared["layouts"] = [one.model_dump(mode="json") for one in self.layouts]
        text = json.dumps([*self.space, compared], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def completed(self, other: Fingerprint) -> Self:
        """This one, with what the other knows besides; for two without differences."""
        missing = {
            name: value
            for name in (*COMPARED, "hash_seed_pinned")
            if getattr(self, name) is None and (value := getattr(other, name)) is not None
        }
        return self.model_copy(update=missing | self._completed_layouts(other))

    def _completed_layouts(self, other: Fingerprint) -> dict[str, Any]:
        """The layouts of both, each worker's once; none changes that is known already."""
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
        """The layout that one is compared with: its own worker's, else that of the worker which was recorded first."""
        return next((one for one in self._all_layouts() if one.worker == layout.worker), self.layout)

    def facts(self) -> dict[str, str]:
        """What is known, in words, by field."""
        names = (*COMPARED, "hash_seed_pinned", "lmcache_version", "written_by", "recorded_at")
        return {name: _word(getattr(self, name)) for name in names if getattr(self, name) is not None}


COMPARED: Final = ("model_revision", "chunk_size", "layout", "hash_algorithm", "hash_check", "hash_bytes")
"""The fields in which two engines of one space must not differ."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which two fingerprints of a space differ.

    Attributes:
        field: Its name, one of `COMPARED`.
        recorded: What the bucket says, in words.
        here: What this engine says.
    """

    field: str
    recorded: str
    here: str

    def __str__(self) -> str:
        return self.words("here")

    def words(self, where: str) -> str:
        """The difference in words; `where` says where the other value is."""
        what = "hash_check (the seed, PYTHONHASHSEED)" if self.field == "hash_check" else self.field
        return f"{what} is {self.recorded} in the bucket and {self.here} {where}"


def differences(recorded: Fingerprint, here: Fingerprint) -> list[Difference]:
    """All in which two engines differ that would use the same keys; empty for engines of different spaces or models.

    Only what both know is compared. Two names of one hash are told by their values: where those are known and equal, the
    names do not matter.
    """
    if recorded.space != here.space or recorded.model != here.model:
        return []
    return [
        Difference(name, _word(_beside(name, recorded, here)), _word(getattr(here, name)))
        for name in COMPARED
        if not _agree(name, recorded, here)
    ]


def _beside(name: str, recorded: Fingerprint, here: Fingerprint) -> Any:
    """The recorded value that a field of an engine is compared with."""
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
    """Differences in one line; see `Difference.words`."""
    return "; ".join(one.words(where) for one in found)


class Record(_Model):
    """What a bucket says of one model: a fingerprint for each space.

    Attributes:
        model: The model's name.
        variants: One for each space.
    """

    model: _Text
    variants: Annotated[tuple[Fingerprint, ...], Field(max_length=MAX_VARIANTS)] = ()

    def of(self, space: Space) -> Fingerprint | None:
        """The fingerprint of a space, if there is one."""
        return next((variant for variant in self.variants if variant.space == space), None)

    def having(self, fingerprint: Fingerprint) -> Record:
        """The record with a fingerprint in the place of that of its space, or beside the others."""
        others = tuple(variant for variant in self.variants if variant.space != fingerprint.space)
        return Record(model=self.model, variants=(*others, fingerprint))

    def to_json(self) -> bytes:
        """The record as its object holds it."""
        return _to_json({"schema": SCHEMA, "model": self.model, "variants": [_plain(one) for one in self.variants]})

    @classmethod
    def from_json(cls, data: bytes, model: str, where: str) -> Record:
        """Read the object of a model.

        Raises:
            IntegrityError: It holds no record, or none of this model; `NewerError` for a newer one.
        """
        record = _read(cls, data, where)
        if record.model != model or any(one.model != model for one in record.variants):
            raise IntegrityError(f"{where}: is the fingerprint of {record.model!r}, not of {model!r}")
        if len({one.space for one in record.variants}) < len(record.variants):
            raise IntegrityError(f"{where}: holds two fingerprints of the same mode, world size and dtype")
        return record


class FingerprintClaim(_Model):
    """The fingerprint of one engine, in an object of its own.

    Attributes:
        fingerprint: The engine's.
    """

    fingerprint: Fingerprint

    @staticmethod
    def to_json(fingerprint: Fingerprint) -> bytes:
        """The object of a fingerprint."""
        return _to_json({"schema": SCHEMA, "fingerprint": _plain(fingerprint)})

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Fingerprint:
        """Read such an object.

        Raises:
            IntegrityError: It holds no fingerprint, or a newer one.
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
