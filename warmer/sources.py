"""A warm-up bound to the configuration of the engines: which bucket, which tiers, with which kind of key."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hfbucket_plugin import metrics
from hfbucket_plugin.engine_config import EngineConfig
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.instance import open_bucket
from hfbucket_plugin.keys import ClassicKey
from hfbucket_plugin.named import named_instances
from warmer.node import NodeConfig
from warmer.prompt_file import PromptFile
from warmer.prompts import PromptOrder, classic_hasher, mp_hasher, read_prompts
from warmer.tiers import Declaration, L1Declaration, LocalCPUDeclaration, TierOptions, named_tier

if TYPE_CHECKING:
    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.keys import Key
    from hfbucket_plugin.named import NamedInstance
    from hfbucket_plugin.settings import InstanceSettings
    from warmer.tiers import AnyTier
    from warmer.warmup import WarmUp

_CHUNK_TOKENS: Final = 256
"""LMCache's own default of `chunk_size`."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a warm-up's names stand for.

    Attributes:
        warm_up: The warm-up.
        instance: Where chunks come from; its settings may hold a token, so it stays in this process.
        tiers: Where they go, in their order.
        prompt_file: The prompts that engines are asked for; None where no tier loads by prompts.
    """

    warm_up: WarmUp
    instance: NamedInstance
    tiers: tuple[AnyTier, ...]
    prompt_file: PromptFile | None = None

    @property
    def lists(self) -> bool:
        """Whether chunks are listed in the bucket: prompts alone say what servers load by themselves."""
        return not all(isinstance(tier, L1Declaration) for tier in self.tiers)

    @property
    def takes(self) -> type[Key]:
        """The kind of key that the tiers take."""
        return self.tiers[0].takes

    def bucket(self) -> Bucket:
        """The door to the bucket. Opens no connection."""
        settings = self.instance.settings
        return open_bucket(settings, self.instance.name, metrics.Tally(), self.warm_up.limits.chunk_timeout)

    def node_config(self, tier: AnyTier) -> NodeConfig:
        """What nodes are told about one tier of directories, or about the staging directories of one of memory.

        Raises:
            ConfigError: The token would have to travel.
        """
        if isinstance(tier, L1Declaration):
            raise TypeError(f"tier {tier.name!r} takes no chunks from nodes: its server loads them by itself")
        earlier = self.tiers[: self.tiers.index(tier)]
        return NodeConfig(
            instance=self.instance.name,
            settings=without_token(self.instance),
            tier=tier.staging if isinstance(tier, LocalCPUDeclaration) else tier,
            token_expected=self.instance.settings.resolve_token() is not None,
            chunk_timeout_secs=self.warm_up.limits.chunk_timeout,
            verify=self.warm_up.moving.verify,
            earlier=tuple(one for one in earlier if isinstance(one, Declaration)),
            capped=(self.warm_up.moving.max_bandwidth or self.warm_up.moving.max_node_bandwidth) is not None,
            verify_present=self.warm_up.moving.verify_present,
        )

    def chunk_tokens(self) -> int:
        """Tokens of a chunk, as the engines have it.

        Raises:
            ConfigError: The engines' configuration says what is no number.
        """
        path = self.warm_up.source.lmcache_config
        if self.takes is not ClassicKey or path is None:
            return self.warm_up.choose.chunk_size
        size = EngineConfig.read(path).engine.get("chunk_size", _CHUNK_TOKENS)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{path}: chunk_size {size!r} is no number of tokens")
        return size

    def prompts(self) -> PromptOrder | None:
        """Where chunks stand among the prompts, when the warm-up names some.

        Raises:
            ConfigError: They cannot be read, or not be hashed.
        """
        choice = self.warm_up.choose
        if choice.prompts is None:
            return None
        prompts = read_prompts(choice.prompts)
        first = next(prompts, None)  # what cannot be read is said before LMCache is loaded
        if first is None:
            raise ConfigError(f"--prompts {str(choice.prompts)!r} holds no prompt")
        if self.takes is not ClassicKey:
            hasher = mp_hasher(choice.chunk_size, choice.hash_algorithm)
        elif self.warm_up.source.lmcache_config is not None:
            hasher = classic_hasher(self.warm_up.source.lmcache_config)
        else:
            raise ConfigError(
                "--prompts: how classic engines hash is said by their LMCache YAML: give --lmcache-config"
            )
        return PromptOrder(itertools.chain([first], prompts), hasher)


def bind(warm_up: WarmUp) -> Bound:
    """Find what a warm-up names.

    Raises:
        ConfigError: The configuration is wrong, or lacks it; or asks for what is not supported.
    """
    source = warm_up.source
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
    if not warm_up.tiers:
        raise ConfigError("--tier: name the tier to fill, such as fs.warm")
    config = EngineConfig.read(source.lmcache_config) if source.lmcache_config else None
    filling = warm_up.filling
    options = TierOptions(
        filling.fsync, filling.max_bytes, filling.min_free, filling.evict, filling.chown, filling.chmod
    )
    tiers = tuple(named_tier(config, text, options) for text in warm_up.tiers)
    if len({tier.takes for tier in tiers}) > 1:
        raise ConfigError("--tier: classic tiers and tiers of `lmcache server` take different keys; fill them apart")
    servers = [tier for tier in tiers if isinstance(tier, L1Declaration)]
    prompts = _prompt_file(servers[0], warm_up, found[0]) if servers else None
    bound = Bound(warm_up, found[0], tiers, prompts)
    without_token(bound.instance)
    return bound


def _prompt_file(tier: L1Declaration, warm_up: WarmUp, instance: NamedInstance) -> PromptFile:
    """The prompts that a server is asked for.

    Raises:
        ConfigError: It cannot be asked, since the warm-up does not say what for; or the prompts cannot be read.
    """
    choice, why = (
        warm_up.choose,
        f"tier {tier.name!r}: `lmcache server` loads its memory for prompts, and takes no keys",
    )
    if instance.mode != "mp":
        raise ConfigError(
            f"tier {tier.name!r} is the memory of `lmcache server`, and {instance.name!r} is an instance of the classic engine, "
            "whose chunks it cannot hold: give --l2-adapter in place of --lmcache-config; the memory of classic engines is "
            "the tier local_cpu"
        )
    if choice.prompts is None:
        raise ConfigError(f"{why}: give --prompts")
    if choice.world_size is None:
        raise ConfigError(f"{why}, each of an engine of so many workers: give --world-size")
    return PromptFile(choice.prompts, choice.model, choice.chunk_size)


def without_token(instance: NamedInstance) -> InstanceSettings:
    """The settings of an instance as they may leave this process.

    Raises:
        ConfigError: The only token is written into the configuration.
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


def recorded(warm_up: WarmUp) -> WarmUp:
    """A warm-up as it may be written down: without a token, whatever the JSON of an adapter holds."""
    text = warm_up.source.l2_adapter
    if text is None:
        return warm_up
    spec = json.loads(text)
    for part in (spec, spec.get("adapter_params")):
        if isinstance(part, dict):
            part.pop("token", None)
    source = warm_up.source.model_copy(update={"l2_adapter": json.dumps(spec)})
    return warm_up.model_copy(update={"source": source})
