"""As operators run it: a job, submitted to a cluster that `ray start` made."""

import json

from private_ray import PrivateRay
from warming import INSTANCE, PREFIX, SECRET, Warehouse, classic_key, content, warm


def summary_in(log):
    lines = [line for line in log.splitlines() if line.startswith('{"event": "summary"')]
    assert lines, log
    return json.loads(lines[-1])


def command(prefix=PREFIX):
    return [
        *("python", "-m", "warmer", "run", "--lmcache-config", "lmcache.yaml", "--instance", INSTANCE),
        *("--prefix", prefix, "--tier", "fs.warm"),
    ]


def test_ray_job_submit(hub_factory, tmp_path):
    from huggingface_hub import HfApi

    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{token: {SECRET}, buckets: {{org/*: write}}}}\n")
    hub = hub_factory(tokens=tokens)
    HfApi(endpoint=hub.endpoint, token=SECRET).create_bucket("org/kv")
    directory = tmp_path / "job"
    directory.mkdir()
    warehouse = Warehouse(hub.endpoint, "org/kv", directory)
    warehouse.put({classic_key(n): content(n) for n in range(20)}, token=SECRET)

    with PrivateRay(WARM_TEST_TOKEN=SECRET) as ray:
        done = ray.submit(warehouse.config.parent, *command())
        assert done.returncode == 0, done.stdout + done.stderr
        summary = summary_in(done.stdout)
        assert (summary["copied"], summary["failed"]) == (20, 0)
        assert warehouse.in_tier() == warehouse.chunks
        assert SECRET not in done.stdout + done.stderr

        failed = ray.submit(directory, *command(prefix="nobody/"))
        assert failed.returncode != 0
        assert "exit code 4" in failed.stdout
        assert "nothing selected" in failed.stdout

        # From a shell, with the cluster's own token at hand.
        again = warm(warehouse.config, "--address", ray.address, WARM_TEST_TOKEN=SECRET, **ray.access)
        assert again.code == 0, again.stderr
        assert again.summary["present"] == 20

        logs = [path for path in ray.directory.rglob("*") if path.is_file() and not path.is_symlink()]
        assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []
