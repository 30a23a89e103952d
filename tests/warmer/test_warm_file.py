"""warm.yaml and flags over it."""

import inspect
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.options import nested
from warmer.request.model import FLAGS, WarmRequest
from warmer.request.warm_file import load_request


def given(**values):
    flags = {flag.variable: flag for flag in FLAGS}
    return {flags[name]: value for name, value in values.items()}


@pytest.fixture
def file(tmp_path):
    def write(document):
        path = tmp_path / "warm.yaml"
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
        return path

    return write


def places(model=WarmRequest, above=()):
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from places(field.annotation, (*above, name))
        else:
            yield (*above, name)


def test_every_flag_has_its_place_and_every_place_its_flag():
    assert sorted(flag.place for flag in FLAGS) == sorted(places())
    assert all(flag.help for flag in FLAGS)


def test_flags_alone():
    wanted = load_request(
        None,
        given(
            prefix=["a", "b"], max_bytes="5GiB", since="24h", workers="0-3", nodes=["a,b"], chmod="0640", newest="7",
            node_selector=["pool=serving"], ranks=["gpu=1=0-3"], fsync=True, chunk_timeout="20",
        ),
    )  # fmt: skip
    assert wanted.choose.prefix == ("a", "b")
    assert (wanted.choose.max_bytes, wanted.choose.since) == (5 * 2**30, timedelta(days=1))
    assert (wanted.choose.newest, wanted.choose.workers) == (7, {0, 1, 2, 3})
    assert (wanted.nodes.names, wanted.nodes.selector) == (("a", "b"), ("pool=serving",))
    assert wanted.nodes.ranks == {"gpu=1": {0, 1, 2, 3}}
    assert (wanted.filling.fsync, wanted.filling.chmod, wanted.limits.chunk_timeout) == (True, 0o640, 20)


def test_flags_of_how_bytes_move():
    wanted = load_request(
        None,
        given(
            direct=True, object_store_fraction="0.2", verify="length", max_bandwidth="2GiB", max_node_bandwidth="500MiB",
            max_inflight_bytes="1GiB", max_duration="90", replace_nodes=True,
        ),
    )  # fmt: skip
    moving = wanted.moving
    assert (moving.direct, moving.object_store_fraction, moving.verify) == (True, 0.2, "length")
    assert (moving.max_bandwidth, moving.max_node_bandwidth, moving.max_inflight_bytes) == (2**31, 500 * 2**20, 2**30)
    assert (wanted.limits.max_duration, wanted.nodes.replace) == (90, True)
    bare = load_request(None, {})
    assert (bare.moving.verify, bare.moving.max_bandwidth, bare.limits.max_duration) == ("hash", None, None)


def test_a_warm_up_reads_back_as_what_it_was():
    wanted = load_request(
        None,
        given(
            prefix=["a"], since="1h", chmod="0640", workers="1-2", keys_from=["k"], ranks=["a=0"],
            max_bandwidth="1GiB", verify="length", max_duration="60",
        ),
    )  # fmt: skip
    assert WarmRequest.model_validate(wanted.model_dump(mode="json", exclude_defaults=True)) == wanted
    assert WarmRequest.model_validate(wanted.model_dump(mode="json")) == wanted


def test_flags_win_over_the_file(file):
    path = file(
        {"choose": {"model": "m", "newest": 3, "workers": 3}, "limits": {"node_timeout": 5}, "tiers": "fs.warm"}
    )
    wanted = load_request(path, given(newest="4", tier=["fs.cold", "fs.colder"]))
    assert (wanted.choose.model, wanted.choose.newest, wanted.choose.workers) == (("m",), 4, {3})
    assert wanted.tiers == ("fs.cold", "fs.colder")
    assert wanted.limits.node_timeout == 5


def test_the_file_wins_over_a_plan_and_flags_over_both(file):
    planned = {"tiers": ["fs.warm"], "nodes": {"names": ["a"]}, "limits": {"node_timeout": 5}}
    wanted = load_request(file({"nodes": {"names": ["b"]}}), given(node_timeout="6"), planned)
    assert (wanted.tiers, wanted.nodes.names, wanted.limits.node_timeout) == (("fs.warm",), ("b",), 6)


def test_a_plan_alone_says_which_chunks(file):
    planned = {"choose": {"model": ["m"]}}
    assert load_request(file({"choose": {"all": True}}), {}, planned).choose.model_dump(exclude_defaults=True) == {
        "model": ("m",)
    }
    with pytest.raises(ConfigError, match="--newest: the plan says"):
        load_request(None, given(newest="3"), planned)


def test_what_excludes_each_other_takes_the_others_place(file):
    path = file({"choose": {"all": True}, "source": {"lmcache_config": "x.yaml", "instance": "i"}})
    assert load_request(path, given(prefix=["a"])).choose.all is False
    assert load_request(file({"choose": {"prefix": "a"}}), given(all=True)).choose.prefix == ()
    with pytest.raises(ConfigError, match="contradict"):
        load_request(path, given(prefix=["a"], all=True))
    path = file({"source": {"lmcache_config": "x.yaml", "instance": "i"}})
    source = load_request(path, given(l2_adapter="{}")).source
    assert (source.l2_adapter, source.lmcache_config, source.instance) == ("{}", None, None)
    assert load_request(file({"source": {"l2_adapter": {}}}), given(lmcache_config="y")).source.l2_adapter is None
    both = load_request(path, given(l2_adapter="{}", lmcache_config="y")).source
    assert (both.l2_adapter, both.lmcache_config) == ("{}", Path("y"))


def test_json_may_stand_as_yaml(file):
    wanted = load_request(
        file({"source": {"l2_adapter": {"type": "hfbucket"}}, "tiers": ["fs.warm", {"type": "fs", "base_path": "/x"}]}),
        {},
    )
    assert wanted.source.l2_adapter == '{"type": "hfbucket"}'
    assert wanted.tiers == ("fs.warm", '{"type": "fs", "base_path": "/x"}')
    assert load_request(file({"tiers": {"type": "fs"}}), {}).tiers == ('{"type": "fs"}',)


@pytest.mark.parametrize("text", ["", "choose:\n", "choose: {all: true}\nnodes:\n"])
def test_an_empty_section_says_nothing(file, text):
    assert load_request(file(text), given(newest="3")).choose.newest == 3


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"chose": {}}, "unknown setting chose (did you mean 'choose'?)"),
        ({"choose": {"modle": "m"}}, "unknown setting choose.modle (did you mean 'model'?)"),
        ({"choose": {"zzzz": "m"}}, "unknown setting choose.zzzz; known are all, chunk_size"),
        ({"nodes": {"selektor": "m"}}, "did you mean 'selector'?"),
        ({"choose": {"max_bytes": "50G"}}, "--max-bytes (choose.max_bytes): invalid size '50G'"),
        ({"choose": {"all": True, "prefix": ["m"]}}, "choose: all and prefix contradict"),
        ({"nodes": {"ranks": {"a": "7-0"}}}, "--ranks (nodes.ranks.a): '7-0'"),
        ({"nodes": {"ranks": ["a"]}}, "--ranks (nodes.ranks)"),
        ({"filling": {"chmod": 640}}, "write the mode as a text"),
        ({"filling": {"chmod": "999"}}, "no mode of a file"),
        ({"limits": {"chunk_timeout": 0}}, "--chunk-timeout (limits.chunk_timeout)"),
        ({"limits": {"max_duration": 0}}, "--max-duration (limits.max_duration)"),
        ({"moving": {"max_bandwith": 1}}, "did you mean 'max_bandwidth'?"),
        ({"moving": {"max_bandwidth": "0"}}, "--max-bandwidth (moving.max_bandwidth)"),
        ({"moving": {"object_store_fraction": 0.9}}, "--object-store-fraction (moving.object_store_fraction)"),
        ({"moving": {"verify": "luck"}}, "--verify (moving.verify): Input should be 'hash' or 'length'"),
        ({"tiers": 3}, "--tier (tiers)"),
        ({"choose": "all"}, "choose: Input should be"),
        ("[1]", "is no mapping"),
        ('{"a": "secret', "is not valid YAML at line 1"),
        ("a: !!binary x", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(file, document, said):
    with pytest.raises(ConfigError) as raised:
        load_request(file(document), {})
    assert said in str(raised.value)
    assert "warm.yaml" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"--newest.*; --max-bytes|--max-bytes.*; --newest"):
        load_request(None, given(newest="x", max_bytes="y"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_request(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match=r"--ranks .*are no ranks"):
        load_request(None, given(ranks=["gpu-1="]))


@pytest.mark.parametrize("ranks", [["0-3"], ["=0-3"], ["gpu-1=0", "0-3"]])
def test_ranks_are_those_of_a_node(ranks):
    with pytest.raises(ConfigError, match=r"--ranks '=?0-3' reads NODE=RANKS"):
        load_request(None, given(ranks=ranks))


def test_a_node_has_its_ranks_once():
    with pytest.raises(ConfigError, match=r"--ranks names gpu-1 twice"):
        load_request(None, given(ranks=["gpu-1=0", "gpu-2=0", "gpu-1=1"]))


def test_what_flags_gave_is_nested():
    assert nested(given(instance="i", all=True, report="r")) == {
        "source": {"instance": "i"}, "choose": {"all": True}, "report": "r",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"), [(90, 90.0), ("90", 90.0), ("1.5", 1.5), ("30m", 1800.0), ("30min", 1800.0)]
)
def test_limits_are_in_seconds_or_with_a_unit(text, seconds):
    limits = WarmRequest.model_validate(
        {"limits": dict.fromkeys(("chunk_timeout", "node_timeout", "max_duration"), text)}
    ).limits

    assert (limits.chunk_timeout, limits.node_timeout, limits.max_duration) == (seconds, seconds, seconds)
