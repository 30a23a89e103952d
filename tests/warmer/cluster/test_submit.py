"""`submit` without a cluster: what it refuses, which code stands for which end of a job, and what becomes of its log."""

import http.server
import io
import json
import threading

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from hfbucket_plugin.errors import ConfigError, Interrupted
from warmer.cli.app import app
from warmer.cluster import submit as submitting
from warmer.cluster.job_env import dashboard_address, refuse_secrets_in, runtime_env
from warmer.cluster.jobs_api import JobsAPI
from warmer.cluster.submit import Log, Submission, outcome, submit
from warmer.report.outcomes import ClusterError, NothingToDoError

SECRET = "a-password-of-this-test-0123456789"
HUB_TOKEN = "hf_" + "aB3" * 10
NOWHERE = "http://127.0.0.1:1"


def refused(*arguments):
    done = CliRunner().invoke(app, ["submit", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["runn"], "'runn' is none of run, plan, apply, check"),
        (["submit", "--", "run"], "'submit' is none of"),
        (["run", "--confg", "warm.yaml"], "No such option: --confg"),
        (["check", "--require", "2"], "--require"),
        (["plan", "--all"], "--out"),
    ],
)
def test_a_command_that_is_none_is_refused_before_anything_is_uploaded(command, words):
    assert words in refused("--address", NOWHERE, "--", *command)


def test_a_cluster_that_does_not_answer():
    for dashes in (["--"], []):
        line = refused("--address", NOWHERE, *dashes, "run", "--config", "warm.yaml")
        assert line.startswith(f"warmer: the Ray cluster at {NOWHERE} does not answer: ")
        assert len(line.splitlines()) == 1


def test_where_jobs_are_submitted_to(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="give --address http://<host>:8265, or set RAY_API_SERVER_ADDRESS or"):
        dashboard_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS '10.0.0.1:6379' does not read http://<host>:<port>"):
        dashboard_address(None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.com/")
    assert dashboard_address(None) == "https://ray.example.com"
    assert dashboard_address("http://head:8265") == "http://head:8265"


def test_a_runtime_environment(tmp_path):
    path = tmp_path / "env.yaml"
    path.write_text("pip: [x]\nworking_dir: other\nenv_vars: {TOKENIZERS_PARALLELISM: 'false', A_TOKEN_PATH: /x}\n")
    assert runtime_env(path, None, ".")["working_dir"] == "."
    assert runtime_env(path, None, None)["working_dir"] == "other"
    assert runtime_env(None, '{"pip": ["x"]}', None) == {"pip": ["x"]}
    assert runtime_env(None, None, None) == {}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"env_vars": {"HF_US_TOKEN": "short"}}, "--runtime-env-json: env_vars gives HF_US_TOKEN a value"),
        ({"env_vars": {"RAY_AUTH_TOKEN": "short"}}, "env_vars gives RAY_AUTH_TOKEN a value"),
        ({"env_vars": {"NOTE": f"see {HUB_TOKEN}"}}, "holds what looks like a token of the Hub"),
        ({"pip": [f"git+https://x:{HUB_TOKEN}@example.com/x"]}, "holds what looks like a token of the Hub"),
        ({"env_vars": {"OTHER": SECRET}}, "holds the value of MY_TOKEN"),
        ([], "is no mapping"),
    ],
)
def test_a_token_never_travels_in_a_runtime_environment(monkeypatch, document, words):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    with pytest.raises(ConfigError, match=words) as caught:
        runtime_env(None, json.dumps(document), None)
    assert not any(secret in str(caught.value) for secret in (SECRET, HUB_TOKEN, "short"))


def test_a_token_never_travels_in_the_address_of_a_working_directory():
    with pytest.raises(ConfigError, match="--working-dir holds what looks like a token") as caught:
        runtime_env(None, None, f"https://x:{HUB_TOKEN}@example.com/x.zip")
    assert HUB_TOKEN not in str(caught.value)


def test_a_token_never_travels_in_a_command(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    for word in (f'--l2-adapter={{"token": "{SECRET}"}}', HUB_TOKEN):
        with pytest.raises(ConfigError, match="the command of the job holds") as caught:
            refuse_secrets_in(["run", word])
        assert word not in str(caught.value)
    refuse_secrets_in(["run", "--prefix", "hf_model@"])


@pytest.mark.parametrize(
    "word",
    [
        '{"type": "plugin", "adapter_params": {"token": "\\u0068f_aB3aB3aB3aB3aB3aB3aB3"}}',
        '--l2-adapter={"type": "plugin", "adapter_params": {"token": "twelve-chars"}}',
        '{"adapter_params": {"t\\u006fken": "oauth.eyJhbGciOi"}}',
        '[{"adapter_params": {"token": "x"}}]',
        '{"remote_storage_plugin.hfbucket.us.token": "twelve-chars"}',
        '\n {"adapter_params": {"token": "twelve-chars"}}',
        '--l2-adapter= {"adapter_params": {"token": "twelve-chars"}}',
        '{"adapter_params": {"token": "twelve-chars", "token": ""}}',
        '{"adapter_params": {"token": ["twelve-chars"]}}',
    ],
)
def test_an_inline_token_is_found_by_its_setting_whatever_it_looks_like(word):
    with pytest.raises(ConfigError, match="the command of the job holds") as caught:
        refuse_secrets_in(["run", "--l2-adapter", word])
    assert not any(secret in str(caught.value) for secret in ("aB3", "twelve", "oauth"))


def test_adapters_without_an_inline_token_are_taken():
    refuse_secrets_in(
        ["run", "--l2-adapter", '{"adapter_params": {"token_env": "HF_TOKEN", "token": ""}}', "{", "[" * 100_000]
    )


def test_a_token_never_travels_as_the_name_of_a_job(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", f'"{SECRET}"')

    assert "--submission-id holds" in refused(
        "--address", NOWHERE, "--submission-id", SECRET, "--", "plan", "--all", "--out", "x"
    )


EXTRA = "remote_storage_plugin.hfbucket.us"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lmcache.yaml", f"extra_config:\n  {EXTRA}.token: twelve-chars\n"),
        ("lmcache.yaml", f'extra_config: \'{{"{EXTRA}.token": "twelve-chars"}}\'\n'),
        ("deep/er/adapter.json", '{"adapter_params": {"bucket_handle": "hf://buckets/o/b", "token": "twelve-chars"}}'),
        ("not-yaml.yml", f"a: [\n{HUB_TOKEN}"),
        ("twice.yaml", f"a: 1\na: 2\n{EXTRA}.token: twelve-chars\n"),
        ("broken.json", '{"bucket_handle": "hf://buckets/o/b", "token": "twelve-chars"'),
        (".env", "X=the-secret-of-the-process"),
    ],
)
def test_a_token_in_the_working_directory_is_not_uploaded(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("MY_TOKEN", '"the-secret-of-the-process"')
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        runtime_env(None, None, str(tmp_path))
    assert str(caught.value).startswith(f"--working-dir: {name!r} holds ")
    assert not any(secret in str(caught.value) for secret in ("twelve-chars", HUB_TOKEN, "the-secret"))

    excludes = json.dumps({"excludes": [name]})
    assert runtime_env(None, excludes, str(tmp_path))["working_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        (["secret.yaml"], True),
        (["a"], True),
        (["a/"], True),
        (["/a/b/secret.yaml"], True),
        (["a/*/secret.yaml"], True),
        (["a/**"], True),
        (["**/secret.yaml"], True),
        (["*.yaml"], True),
        (["secret.yaml/"], False),
        (["/secret.yaml"], False),
        (["b/secret.yaml"], False),
        (["a/*.yaml"], False),
        (["*", "!secret.yaml"], False),
    ],
)
def test_what_is_excluded_is_what_ray_leaves_out(tmp_path, patterns, excluded):
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    path = tmp_path / "a" / "b" / "secret.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"{EXTRA}.token: twelve-chars\n")
    assert packaging._get_excludes(tmp_path, patterns)(path) == excluded or not excluded

    given = json.dumps({"excludes": patterns})
    if excluded:
        assert runtime_env(None, given, str(tmp_path))["working_dir"] == str(tmp_path)
    else:
        with pytest.raises(ConfigError, match="holds a value of the setting token"):
            runtime_env(None, given, str(tmp_path))


def test_a_token_deep_in_a_long_file_is_found_and_too_many_files_are_refused(tmp_path, monkeypatch):
    long = tmp_path / "long.json"
    for at in (1_048_570, 2_097_150, 2_500_000):
        long.write_text(" " * at + HUB_TOKEN + " " * 1_000_000)
        with pytest.raises(ConfigError, match=r"--working-dir: 'long\.json' holds"):
            runtime_env(None, None, str(tmp_path))
    long.unlink()
    monkeypatch.setattr("warmer.cluster.job_env._MOST_UPLOADED", 3)
    for number in range(4):
        (tmp_path / f"{number}.json").touch()
    with pytest.raises(ConfigError, match=r"--working-dir holds more than 3 files .*excludes"):
        runtime_env(None, None, str(tmp_path))
    assert runtime_env(None, '{"excludes": ["0.json"]}', str(tmp_path))["working_dir"] == str(tmp_path)


def test_other_files_of_a_working_directory_are_nobodys_business(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"token": "<s>", "model": {"token": "abcdefghij"}}')
    (tmp_path / "lmcache.yaml").write_text(f"extra_config: {{{EXTRA}.token_env: HF_US_TOKEN}}")
    (tmp_path / "large.json").write_text(" " * 2_000_000)
    (tmp_path / "gone.yaml").symlink_to("nowhere")

    assert runtime_env(None, None, str(tmp_path))["working_dir"] == str(tmp_path)


def test_a_runtime_environment_that_cannot_be_read(tmp_path):
    path = tmp_path / "env.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        runtime_env(path, None, None)
    path.write_text(f"env_vars: {{a: {HUB_TOKEN}")
    with pytest.raises(ConfigError, match="is not valid YAML at line 1"):
        runtime_env(path, None, None)
    with pytest.raises(ConfigError, match="is no JSON"):
        runtime_env(None, "{", None)
    with pytest.raises(ConfigError, match="is no JSON"):
        runtime_env(None, "[" * 100_000, None)
    with pytest.raises(ConfigError, match="name two environments"):
        runtime_env(path, "{}", None)


def ended(status, code=None, **more):
    return JobDetails(type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="x", driver_exit_code=code, **more)


@pytest.mark.parametrize(
    ("details", "code", "words"),
    [
        (ended("SUCCEEDED", 0), 0, ""),
        (ended("SUCCEEDED"), 0, ""),
        (ended("FAILED", 3), 3, ""),
        (ended("FAILED", 127), 127, ""),
        (ended("STOPPED"), 5, "it was stopped"),
        (ended("FAILED", -9), 3, "it was killed by signal 9"),
        (ended("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE", message="no\n such pip"), 2, "set up: no such pip"),
        (ended("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="gone"), 3, "not end by itself: gone"),
        (None, 3, "has not told of it"),
    ],
)
def test_which_code_stands_for_which_end(details, code, words):
    found, reported = outcome(details)
    assert found == code
    assert words in reported
    assert bool(reported) == bool(words)


def test_a_log_that_start_over_is_passed_on_once():
    out = io.StringIO()
    log = Log(out)
    record = json.dumps({"event": "summary", "exit_code": 0})
    text = f'one\n{{"event": "progress"}}\n{record}\n{{"event": broken\nlast'
    for piece in (text[:5], text[5:40], text[40:41]):
        log.add(piece)
    log.from_start()
    for piece in (text[:3], text[3:60], text[60:]):
        log.add(piece)
    log.close()
    assert out.getvalue() == f"{text}\n"
    assert log.record == {"event": "summary", "exit_code": 0}


def test_the_job_gets_its_words_as_they_are():
    wanted = Submission(["run", "--prefix", "org/a model@", "--all"], {})
    assert wanted.entrypoint == "python -m warmer run --prefix 'org/a model@' --all"
    assert wanted.submission_id != Submission(["run"], {}).submission_id
    for name in ("", "a/b", "a b"):
        with pytest.raises(ConfigError, match="is no name"):
            Submission(["run"], {}, name)


class Tail:
    """A log that ends after its pieces."""

    def __init__(self, pieces):
        self._pieces = list(pieces)

    @property
    def ended(self):
        return not self._pieces

    def next(self, _secs):
        return self._pieces.pop(0) if self._pieces else ""


class FailingCluster:
    """A cluster whose answers come as they are listed: what real ones do when their head restarts."""

    address = NOWHERE

    def __init__(self, *answers, logs=(("one\n",),)):
        self._answers, self._logs = list(answers), list(logs)
        self.stopped = []

    def find(self, _):
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def submit(self, entrypoint, submission_id, runtime_env):
        """Taken."""

    def stop(self, submission_id):
        self.stopped.append(submission_id)

    def follow(self, _):
        return Tail(self._logs.pop(0) if len(self._logs) > 1 else self._logs[0])


@pytest.fixture
def quick(monkeypatch):
    for name in ("_POLL_SECS", "_SILENCE_SECS", "_DRAIN_SECS", "_STOP_SECS"):
        monkeypatch.setattr(submitting, name, 0.01)


GONE = ClusterError("the Ray cluster does not answer")
RUNNING = ended("RUNNING")


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_is_away_for_a_while(caplog, monkeypatch):
    monkeypatch.setattr(submitting, "_SILENCE_SECS", 60.0)
    out = io.StringIO()
    logs = (("one\n",), ("one\n", "tw"), ("one\ntwo\n", '{"event": "summary"}\n'))
    cluster = FailingCluster(None, RUNNING, GONE, RUNNING, RUNNING, ended("FAILED", 3), logs=logs)
    record = submit(cluster, Submission(["run"], {}, "name"), out)
    assert (record["exit_code"], record["record"]) == (3, {"event": "summary"})
    assert out.getvalue() == 'one\ntwo\n{"event": "summary"}\n'
    assert "asking again" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_token_that_comes_in_pieces_is_cut_from_the_log():
    out = io.StringIO()
    pieces = ("one ", f"two {HUB_TOKEN[:9]}", HUB_TOKEN[9:], " three\nand it ends in ", HUB_TOKEN[:12], HUB_TOKEN[12:])
    submit(FailingCluster(None, RUNNING, ended("SUCCEEDED", 0), logs=(pieces,)), Submission(["run"], {}, "name"), out)
    assert out.getvalue() == "one two *** three\nand it ends in ***\n"


def test_a_line_of_the_log_without_an_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(submitting, "_LONGEST_RECORD", 30)
    log = submitting.Log(io.StringIO())
    for _ in range(100):
        log.add('{"event": "summary", "x')
    assert len(log._line) <= 60
    log.add('"}\n{"event": "summary"}\n')
    assert log.record == {"event": "summary"}


@pytest.mark.usefixtures("quick")
def test_a_line_of_the_log_that_nests_too_deep_is_no_record():
    line = '{"event": ' + "[" * 100_000 + "\n"
    cluster = FailingCluster(None, RUNNING, ended("SUCCEEDED", 0), logs=((line, '{"event": "summary"}\n'),))
    record = submit(cluster, Submission(["run"], {}, "name"), io.StringIO())
    assert (record["exit_code"], record["record"]) == (0, {"event": "summary"})


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_does_not_come_back(caplog):
    record = submit(FailingCluster(None, RUNNING, GONE), Submission(["run"], {}, "name"), io.StringIO())
    assert (record["exit_code"], record["status"], record["driver_exit_code"]) == (3, "UNKNOWN", None)
    assert "the job may go on without us" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_comes_back_without_its_records(caplog):
    """As a head without a store of its own does: it answers, and knows of no job."""
    record = submit(FailingCluster(None, RUNNING, None), Submission(["run"], {}, "name"), io.StringIO())
    assert (record["exit_code"], record["status"]) == (3, "UNKNOWN")
    assert "be lost with it" in caplog.text


class Head(http.server.BaseHTTPRequestHandler):
    """A dashboard that is there, and cannot tell of jobs yet."""

    def do_GET(self):
        version = self.path == "/api/version"
        body = b'{"version": "4", "ray_version": "2", "ray_commit": "x", "session_name": "x"}' if version else b"no GCS"
        self.send_response(200 if version else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


def test_a_head_that_is_not_ready_yet_refuses_nothing():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Head) as head:
        threading.Thread(target=head.serve_forever, daemon=True).start()
        try:
            api = JobsAPI(f"http://127.0.0.1:{head.server_port}")
            with pytest.raises(ClusterError, match=r"cannot answer: .*status code 500"):
                api.find("name")
        finally:
            head.shutdown()


@pytest.mark.usefixtures("quick")
def test_a_name_that_somebody_else_took_a_moment_ago():
    cluster = FailingCluster(None, RUNNING)
    cluster.submit = lambda *_: (_ for _ in ()).throw(ConfigError("the Ray cluster refuses it"))
    with pytest.raises(NothingToDoError, match=r"'name' was submitted before \(RUNNING\): a job runs once"):
        submit(cluster, Submission(["run"], {}, "name"), io.StringIO())


@pytest.mark.usefixtures("quick")
def test_a_job_that_was_quicker_than_the_order_to_stop(monkeypatch):
    cluster = FailingCluster(None, ended("SUCCEEDED", 0))
    cluster.follow = lambda _: (_ for _ in ()).throw(Interrupted)
    record = submit(cluster, Submission(["run"], {}, "name"), io.StringIO())
    assert (record["exit_code"], cluster.stopped) == (0, ["name"])


@pytest.mark.usefixtures("quick")
def test_a_job_that_arrives_after_the_order_to_stop_is_stopped(monkeypatch):
    monkeypatch.setattr(submitting, "_STOP_SECS", 60.0)
    cluster = FailingCluster(None, None, None, RUNNING, ended("STOPPED"))
    stop = cluster.stop
    cluster.submit = lambda *_: (_ for _ in ()).throw(Interrupted)
    cluster.stop = lambda name: (
        stop(name) if cluster.find(name) is not None else pytest.fail("there is no such job yet")
    )
    record = submit(cluster, Submission(["run"], {}, "name"), io.StringIO())
    assert (record["exit_code"], record["status"], cluster.stopped) == (5, "STOPPED", ["name"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("more", "code", "status"), [({"wait": False}, 0, "PENDING"), ({"detach": True}, 5, "DETACHED")]
)
def test_a_job_that_goes_on_without_us(more, code, status):
    cluster = FailingCluster(None, RUNNING)
    cluster.follow = lambda _: (_ for _ in ()).throw(Interrupted)
    record = submit(cluster, Submission(["run"], {}, "name", **more), io.StringIO())
    assert (record["exit_code"], record["status"], cluster.stopped) == (code, status, [])
