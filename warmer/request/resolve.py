"""Resolution of a request: its instance, tiers, prompts, and fingerprints."""

from __future__ import annotations

import itertools
import json
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.config.instances import named_instances
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ClassicKey
from hfbucket_plugin.errors import ConfigError, HFBucketError
from hfbucket_plugin.fingerprint import detect
from hfbucket_plugin.fingerprint.detect import as_configured
from hfbucket_plugin.fingerprint.model import as_text, differences, printable
from hfbucket_plugin.fingerprint.store import FingerprintStore
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.tools.prompts import PromptOrder, classic_hasher, mp_hasher, read_prompts
from warmer.node.prompts import PromptFile
from warmer.node.worker import NodeConfig
from warmer.report.outcomes import NothingToDoError
from warmer.tiers import Declaration, L1Declaration, LocalCPUDeclaration, TierOptions, named_tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.keys import Key
    from hfbucket_plugin.fingerprint.model import Fingerprint
    from hfbucket_plugin.hub.bucket import Bucket
    from warmer.plan.build import PlanBuilder
    from warmer.request.model import WarmRequest
    from warmer.tiers import AnyTier


_log = logging.getLogger(__name__)

_MODELS: Final = 20
"""Maximum number of models whose fingerprints are read, each of which costs a call."""

_SECS: Final = 30.0

_AFTER_MODEL: Final = re.compile(r"[0-9]{1,7}|[0-9a-f]{8,}")
"""World size in classic keys, or rank in keys of MP mode."""


@dataclass(slots=True)
class Compared:
    """Result of comparing fingerprints with the configuration.

    Attributes:
        facts: For the header of a plan: for each fingerprint its model, its kind of keys, its digest, its content, and the
            differences from the configuration.
        agree: Fingerprints that agree with the configuration.
        conflicts: Descriptions of the fingerprints that differ from it.
    """

    facts: list[dict[str, Any]] = field(default_factory=list)
    agree: int = 0
    conflicts: list[str] = field(default_factory=list)


def compare(resolved: ResolvedRequest, choosing: PlanBuilder, bucket: Bucket) -> Compared:
    """Compare the recorded fingerprints of the chosen models with the configuration, and the hashes of prompts if any.

    Differences are logged as warnings; if no engine of the configuration would find the chunks and `fingerprint` is
    `enforce`, the run is refused.

    Raises:
        NothingToDoError: The run is refused.
        HFBucketError: The fingerprints cannot be read while `fingerprint` is `enforce`.
    """
    mode = resolved.instance.settings.fingerprint
    compared = Compared()
    if mode == "off":
        return compared
    try:
        _read(resolved, choosing, bucket, compared)
    except HFBucketError as error:
        if mode == "enforce":
            raise
        _log.warning("the fingerprints of the chosen models are not known: %s", error)
    for words in compared.conflicts:
        _log.warning("%s", words)
    if mode == "enforce" and compared.conflicts and not compared.agree:
        raise NothingToDoError(
            f"the engines of this configuration would be served none of it (fingerprint: enforce): {compared.conflicts[0]}; see "
            "docs/fingerprint.md"
        )
    return compared


def _read(resolved: ResolvedRequest, choosing: PlanBuilder, bucket: Bucket, compared: Compared) -> None:
    store = FingerprintStore(bucket, resolved.instance.name)
    try:
        for model in itertools.islice(_models(choosing, store), _MODELS):
            found = store.read(model, Deadline.patient(_SECS))
            known = _of_mode(resolved, found.record.variants if found is not None else ())
            if not known:  # an engine that ended right after its first store left a claim, but no record
                known = _of_mode(resolved, store.first_claimed(store.claims(model, Deadline.patient(_SECS)), None))
            for recorded in known:
                _judge(resolved, choosing, recorded, compared)
    finally:
        store.close()


def _of_mode(resolved: ResolvedRequest, fingerprints: Iterable[Fingerprint]) -> list[Fingerprint]:
    return [one for one in fingerprints if (one.mode == "classic") is (resolved.takes is ClassicKey)]


def _models(choosing: PlanBuilder, store: FingerprintStore) -> list[str]:
    selection, prompts = choosing.selection, choosing.prompts
    if selection.model:
        return list(selection.model)
    if prompts is not None and prompts.models is not None:
        return sorted(prompts.models)
    if selection.prefix and all("@" in prefix for prefix in selection.prefix):
        return sorted({model for prefix in selection.prefix for model in _possible_models(prefix)})
    return list(itertools.islice(store.models(_SECS), _MODELS))


def _possible_models(prefix: str) -> Iterator[str]:
    """Yield the models whose keys may start with a text that contains `@`: a model's name may contain `@` itself."""
    fields = prefix.split("@")
    for place in range(1, len(fields)):
        yield "@".join(fields[:place])
        if _AFTER_MODEL.fullmatch(fields[place]):
            return


def _judge(resolved: ResolvedRequest, choosing: PlanBuilder, recorded: Fingerprint, compared: Compared) -> None:
    here = as_configured(recorded, resolved.instance)
    if choosing.prompts is not None:
        here = _as_hashed(resolved, recorded, here)
    wrong = differences(recorded, here) if here is not None else []
    where = "where this command runs" if choosing.prompts is not None else "in this configuration"
    if wrong:
        who = f"{printable(recorded.model)} ({printable(str(recorded.space))})"
        compared.conflicts.append(f"the fingerprint of {who}: {as_text(wrong, where)}")
    else:
        compared.agree += 1
    compared.facts.append(
        {"model": recorded.model, "of": str(recorded.space), "digest": recorded.digest}
        | recorded.facts()
        | ({"differs": as_text(wrong, where)} if wrong else {})
    )


def _as_hashed(resolved: ResolvedRequest, recorded: Fingerprint, here: Fingerprint | None) -> Fingerprint | None:
    """Return the fingerprint of an engine that hashes as the prompts were hashed here."""
    selection = resolved.request.choose
    if recorded.mode == "classic":
        algorithm = here.hash_algorithm if here is not None else None
        return here and here.model_copy(update={"hash_check": algorithm and detect.classic_check(algorithm)})
    base = here or recorded.model_copy(update={"layout": None, "model_revision": None, "hash_bytes": None})
    return base.model_copy(
        update={
            "chunk_size": selection.chunk_size,
            "hash_algorithm": selection.hash_algorithm,
            "hash_check": detect.mp_check(selection.hash_algorithm),
        }
    )


_CHUNK_TOKENS: Final = 256
"""LMCache's default of `chunk_size`."""


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """Objects that a warm-up's names stand for.

    Attributes:
        request: The warm-up.
        instance: Source of the chunks; its settings may hold a token, so it stays in this process.
        tiers: Destinations of the chunks, in order.
        prompt_file: Prompts for engines that load by prompts; None if no tier does.
    """

    request: WarmRequest
    instance: InstanceConfig
    tiers: tuple[AnyTier, ...]
    prompt_file: PromptFile | None = None

    @property
    def lists(self) -> bool:
        """Whether chunks are listed in the bucket; if not, servers load by prompts alone."""
        return not all(isinstance(tier, L1Declaration) for tier in self.tiers)

    @property
    def takes(self) -> type[Key]:
        """Kind of key that the tiers accept."""
        return self.tiers[0].takes

    def bucket(self) -> Bucket:
        """Return the bucket client, without opening a connection."""
        settings = self.instance.settings
        return open_bucket(settings, self.instance.name, telemetry.MemorySink(), self.request.limits.chunk_timeout)

    def node_config(self, tier: AnyTier) -> NodeConfig:
        """Return the configuration of nodes for one directory tier, or for the staging directories of a memory tier.

        Raises:
            ConfigError: The token would have to be sent to the nodes.
        """
        if isinstance(tier, L1Declaration):
            raise TypeError(f"tier {tier.name!r} takes no chunks from nodes: its server loads them by itself")
        earlier = self.tiers[: self.tiers.index(tier)]
        return NodeConfig(
            instance=self.instance.name,
            settings=without_token(self.instance),
            tier=tier.staging if isinstance(tier, LocalCPUDeclaration) else tier,
            token_expected=self.instance.settings.resolve_token() is not None,
            chunk_timeout_secs=self.request.limits.chunk_timeout,
            verify=self.request.moving.verify,
            earlier=tuple(one for one in earlier if isinstance(one, Declaration)),
            capped=(self.request.moving.max_bandwidth or self.request.moving.max_node_bandwidth) is not None,
            verify_present=self.request.moving.verify_present,
        )

    def chunk_tokens(self) -> int:
        """Return the tokens of a chunk in the engines' configuration.

        Raises:
            ConfigError: The configured value is not a number.
        """
        path = self.request.source.lmcache_config
        if self.takes is not ClassicKey or path is None:
            return self.request.choose.chunk_size
        size = EngineConfig.read(path).engine.get("chunk_size", _CHUNK_TOKENS)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{path}: chunk_size {size!r} is no number of tokens")
        return size

    def prompts(self) -> PromptOrder | None:
        """Return the order of chunks in the prompts; None if the warm-up names no prompts.

        Raises:
            ConfigError: The prompts cannot be read or hashed.
        """
        selection = self.request.choose
        if selection.prompts is None:
            return None
        prompts = read_prompts(selection.prompts)
        first = next(prompts, None)  # report an unreadable file before LMCache is loaded
        if first is None:
            raise ConfigError(f"--prompts {str(selection.prompts)!r} holds no prompt")
        if self.takes is not ClassicKey:
            hasher = mp_hasher(selection.chunk_size, selection.hash_algorithm)
        elif self.request.source.lmcache_config is not None:
            hasher = classic_hasher(self.request.source.lmcache_config)
        else:
            raise ConfigError(
                "--prompts: how classic engines hash is said by their LMCache YAML: give --lmcache-config"
            )
        return PromptOrder(itertools.chain([first], prompts), hasher)


def resolve_request(request: WarmRequest) -> ResolvedRequest:
    """Resolve the names in a warm-up.

    Raises:
        ConfigError: The configuration is invalid, lacks a name, or requests something that is not supported.
    """
    source = request.source
    if source.l2_adapter is not None and source.lmcache_config is not None:
        raise ConfigError("--l2-adapter and --lmcache-config name two sources; a warm-up has one")
    found = named_instances(
        source.lmcache_config,
        [source.instance] if source.instance else [],
        [source.l2_adapter] if source.l2_adapter else [],
    )
    if len(found) != 1:
        names = ", ".join(instance.name for instance in found)
        raise ConfigError(f"--instance: {source.lmcache_config} declares {names}; name one of these")
    if not request.tiers:
        raise ConfigError("--tier: name the tier to fill, such as fs.warm")
    config = EngineConfig.read(source.lmcache_config) if source.lmcache_config else None
    filling = request.filling
    options = TierOptions(
        filling.fsync, filling.max_bytes, filling.min_free, filling.evict, filling.chown, filling.chmod
    )
    tiers = tuple(named_tier(config, text, options) for text in request.tiers)
    if len({tier.takes for tier in tiers}) > 1:
        raise ConfigError("--tier: classic tiers and tiers of `lmcache server` take different keys; fill them apart")
    servers = [tier for tier in tiers if isinstance(tier, L1Declaration)]
    prompts = _prompt_file(servers[0], request, found[0]) if servers else None
    resolved = ResolvedRequest(request, found[0], tiers, prompts)
    without_token(resolved.instance)
    return resolved


def _prompt_file(tier: L1Declaration, request: WarmRequest, instance: InstanceConfig) -> PromptFile:
    """Return the prompts for a server.

    Raises:
        ConfigError: The warm-up lacks what the server needs to load prompts, or the prompts cannot be read.
    """
    selection, why = (
        request.choose,
        f"tier {tier.name!r}: `lmcache server` loads its memory for prompts, and takes no keys",
    )
    if instance.mode != "mp":
        raise ConfigError(
            f"tier {tier.name!r} is the memory of `lmcache server`, and {instance.name!r} is an instance of the classic engine, "
            "whose chunks it cannot hold: give --l2-adapter in place of --lmcache-config; the memory of classic engines is "
            "the tier local_cpu"
        )
    if selection.prompts is None:
        raise ConfigError(f"{why}: give --prompts")
    if selection.world_size is None:
        raise ConfigError(f"{why}, each of an engine of so many workers: give --world-size")
    return PromptFile(selection.prompts, selection.model, selection.chunk_size)


def without_token(instance: InstanceConfig) -> InstanceSettings:
    """Return the settings of an instance without its token, so that they may leave this process.

    Raises:
        ConfigError: The only token is an inline one in the configuration.
    """
    settings, name = instance.settings, instance.name
    bare = settings.model_copy(update={"token": None})
    if settings.resolve_token() is not None and bare.resolve_token() is None:
        where = f"remote_storage_plugin.{name}.token" if instance.mode == "classic" else "token in --l2-adapter"
        raise ConfigError(
            f"instance {name!r}: {where} is written into the configuration; it would have to travel through Ray to the "
            f"nodes, which is never done. Set the environment variable {settings.token_env} on all nodes (token_env names "
            "it), and leave the token out"
        )
    return bare


def recorded(request: WarmRequest) -> WarmRequest:
    """Return a warm-up for a record, without the token that the JSON of an adapter may hold."""
    text = request.source.l2_adapter
    if text is None:
        return request
    spec = json.loads(text)
    for part in (spec, spec.get("adapter_params")):
        if isinstance(part, dict):
            part.pop("token", None)
    source = request.source.model_copy(update={"l2_adapter": json.dumps(spec)})
    return request.model_copy(update={"source": source})
