"""As a schedule runs it: `ray job submit`, on a cluster that `ray start` made, with batches on actors."""

import json
import sys
from pathlib import Path

from depot import DAY, INSTANCE, Depot, key
from plugin_support import SECRET

from localhub.faults import Fault

sys.path.insert(0, str(Path(__file__).parents[1] / "warmer"))

OLD = [key(number) for number in range(12)]
NEW = [key(number) for number in range(100, 140)]


def command(*more):
    where = ("--lmcache-config", "lmcache.yaml", "--instance", INSTANCE)
    return [
        "python",
        "-m",
        "jobs",
        "cleanup",
        *where,
        "--max-age",
        "14d",
        "--yes",
        "--batch-size",
        "3",
        "--parallel",
        "2",
        *more,
    ]


def export(*more):
    ends = ("--from", INSTANCE, "--to", "hfbucket.eu", "--lmcache-config", "lmcache.yaml")
    return ["python", "-m", "jobs", "export", *ends, "--mode", "stream", "--window", "1KB", "--parallel", "2", *more]


def summary_in(log):
    lines = [line for line in log.splitlines() if line.startswith('{"record": "summary"')]
    assert lines, log
    return json.loads(lines[-1])


def test_ray_job_submit(hub_factory, tmp_path):
    from huggingface_hub import HfApi
    from private_ray import PrivateRay

    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{token: {SECRET}, buckets: {{'org/*': write}}}}\n")
    hub = hub_factory(tokens=tokens, faults=True)
    api = HfApi(endpoint=hub.endpoint, token=SECRET)
    api.create_bucket("org/kv")
    directory = tmp_path / "job"
    directory.mkdir()
    depot = Depot(hub, "org/kv", directory, others={"hfbucket.eu": "kv/eu"})
    assert depot.config.exists()
    api.batch_bucket_files("org/kv", add=[(one.encode(), depot.path(one)) for one in OLD + NEW])
    depot.make_older(depot.paths_of(OLD), 20 * DAY)
    depot.make_older(depot.paths_of(NEW), 1 * DAY)

    with PrivateRay(JOBS_TEST_TOKEN=SECRET) as ray:
        refused = ray.submit(directory, *command("--max-delete", "5"))
        assert refused.returncode == 1
        assert "exit code 4" in refused.stdout
        assert summary_in(refused.stdout)["deleted"]["objects"] == 0

        hub.control.add_fault(Fault(route="batch", items="%401000%40", items_error="not today"))
        failed = ray.submit(directory, *command())
        assert failed.returncode == 1
        assert "exit code 3" in failed.stdout
        summary = summary_in(failed.stdout)
        assert (summary["deleted"]["objects"], summary["failed"]["objects"]) == (11, 1)
        assert summary["failures"] == [{"path": depot.path(OLD[0]), "message": "not today"}]

        listed = {item.path for item in api.list_bucket_tree("org/kv", recursive=True)}
        assert listed == depot.paths_of([OLD[0], *NEW]) | {f"{depot.prefix}/.hfbucket/reports/cleanup.json"}

        exported = ray.submit(directory, *export("--max-bytes", "1KiB"))
        assert exported.returncode == 0, exported.stdout
        summary = summary_in(exported.stdout)
        assert (summary["how"], summary["streamed"], summary["failed"]["objects"]) == ("stream", summary["chosen"], 0)
        listed = {item.path: item.xet_hash for item in api.list_bucket_tree("org/kv", recursive=True)}
        there = {path: found for path, found in listed.items() if path.startswith("kv/eu/")}
        assert len(there) == summary["chosen"]["objects"] > 10
        assert all(listed[path.replace("kv/eu/", "kv/us/")] == found for path, found in there.items())
        assert SECRET not in refused.stdout + failed.stdout + exported.stdout
        logs = [path for path in ray.directory.rglob("*") if path.is_file() and not path.is_symlink()]
        assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []
