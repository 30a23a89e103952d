"""Retention policy of one instance, from `retention.yaml` or from flags: what is kept and for how long."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path  # noqa: TC003 - pydantic and Typer look at annotations
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    Strict,
    ValidationError,
    model_validator,
)

from hfbucket_plugin.config.yaml_file import read_yaml
from hfbucket_plugin.core.keys import model_of
from hfbucket_plugin.core.texts import did_you_mean
from hfbucket_plugin.core.units import format_duration, parse_bytes, parse_duration
from hfbucket_plugin.errors import ConfigError

Duration = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)]
Size = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Start = Annotated[str, Field(min_length=1)]
"""Prefix of a key. It must not be empty: that would match everything, and is probably a mistake."""

MIN_AGE: Final = timedelta(hours=1)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RetentionLimits(_Section):
    """Retention limits of a set of objects."""

    max_age: Annotated[Duration, Field(gt=timedelta(0))] | None = Field(
        default=None, description="Objects that the Hub took longer ago than this are deleted (`expired`)."
    )
    max_idle: Annotated[Duration, Field(gt=timedelta(0))] | None = Field(
        default=None, description="Objects that were neither put nor read for longer than this are deleted (`idle`)."
    )
    max_bytes: Size | None = Field(
        default=None,
        description="While the objects take more than this, those are deleted whose last use, put or read, is the longest ago "
        "(`over-budget`).",
    )
    max_objects: Annotated[PositiveInt, Strict()] | None = Field(
        default=None, description="While there are more objects than this, the same are deleted (`over-budget`)."
    )
    keep_newest: Annotated[NonNegativeInt, Strict()] = Field(
        default=0,
        description="So many of the objects that were put last are kept, whatever other rules say (`shielded`).",
    )

    @property
    def bounds_anything(self) -> bool:
        """Whether the limits can cause a deletion."""
        return self.max_age is not None or self.needs_access

    @property
    def needs_access(self) -> bool:
        """Whether the limits depend on last reads."""
        return any(limit is not None for limit in (self.max_idle, self.max_bytes, self.max_objects))

    @property
    def needs_order(self) -> bool:
        """Whether all objects must be known before the first decision."""
        return bool(self.keep_newest) or self.max_bytes is not None or self.max_objects is not None


class Rule(RetentionLimits):
    """Limits of the keys with a prefix, or of one model.

    The first rule that matches a key sets its `max_age` and `max_idle`.
    """

    prefix: Start | None = Field(default=None, description="The start of the keys that the rule is for.")
    model: Start | None = Field(
        default=None, description="The model that the rule is for, as engines were given its name."
    )

    @model_validator(mode="after")
    def _is_for_something(self) -> Rule:
        if self.prefix is None and self.model is None:
            raise ValueError("a rule needs prefix or model")
        return self

    def matches(self, key: str) -> bool:
        """Return whether the rule applies to a key; prefix and model must both match if both are set."""
        by_model = self.model is None or (key.startswith(f"{self.model}@") and model_of(key) == self.model)
        return by_model and (self.prefix is None or key.startswith(self.prefix))


class Models(_Section):
    """Models that are still served."""

    keep: Annotated[tuple[Start, ...], Field(min_length=1)] = Field(
        description="Objects of all other models are deleted (`model-retired`)."
    )


class Policy(RetentionLimits):
    """Retention policy of an instance.

    Its own `max_age` and `max_idle` apply to keys without a matching rule; its budgets and `keep_newest` apply to all
    objects.
    """

    min_age: Duration = Field(default=MIN_AGE, description="Nothing younger is ever deleted (`too-young`).")
    keep_prefix: tuple[Start, ...] = Field(
        default=(), description="Keys that start with one of these are kept (`shielded`)."
    )
    models: Models | None = Field(default=None, description="Retire models by naming those that stay.")
    rules: tuple[Rule, ...] = Field(default=(), description="Limits for some keys; the first match wins.")

    @property
    def deletes_anything(self) -> bool:
        """Whether the policy can cause a deletion."""
        return self.models is not None or any(limits.bounds_anything for limits in (self, *self.rules))

    @property
    def goes_by_use(self) -> bool:
        """Whether the policy depends on last reads."""
        return any(limits.needs_access for limits in (self, *self.rules))

    @property
    def streams(self) -> bool:
        """Whether each decision depends on a single object."""
        return not any(limits.needs_order for limits in (self, *self.rules))

    def record(self) -> dict[str, Any]:
        """Return the settings that were set, for a plan's header."""
        return self.model_dump(mode="json", exclude_unset=True)


def from_values(values: Any, where: str) -> Policy:
    """Create a policy from a mapping.

    Raises:
        ConfigError: If settings are invalid; the message starts with `where`, and names each one and the nearest known
            name.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping of settings")
    try:
        policy = Policy.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{where}: {_in_words(one)}" for one in error.errors())) from None
    if not policy.deletes_anything:
        raise ConfigError(
            f"{where}: this policy deletes nothing; give max_age, max_idle, max_bytes, max_objects or models.keep, or a rule with them"
        )
    return policy


_NAMES: Final = sorted({*Policy.model_fields, *Rule.model_fields, *Models.model_fields})


def _in_words(problem: Any) -> str:
    setting = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {setting}{did_you_mean(str(problem['loc'][-1]), _NAMES)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{setting}: {message}" if setting else message


def read(path: Path, instance: str) -> Policy:
    """Return the policy of an instance in a `retention.yaml`: its own below `instances`, otherwise `default`.

    Raises:
        ConfigError: If the file cannot be read, or its policy for the instance is missing or invalid.
    """
    document = read_yaml(path, "--policy")
    instances = document.get("instances", {}) if isinstance(document, dict) else None
    if not isinstance(instances, dict) or set(document) - {"instances", "default"}:
        raise ConfigError(f"{path}: must be a mapping with instances, default or both, and nothing else")
    if instance in instances:
        return from_values(instances[instance], f"{path}: instances.{instance}")
    if "default" in document:
        return from_values(document["default"], f"{path}: default")
    known = ", ".join(map(str, instances)) or "none"
    raise ConfigError(f"{path}: has no policy for instance {instance!r} and no default; it has {known}")
