"""Engines that answer nothing, or that they are busy, for a moment: what is loaded all the same, and when a node is given up."""

import gzip
from array import array
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.tools.selection import ChunkRef
from tests.warmer.cluster.test_engine_tiers import PLACE, engine
from warmer.node.engine_memory import StagingDirectory
from warmer.node.prompts import AskedPrompt, PromptLoader
from warmer.report.outcomes import EngineError
from warmer.tiers import engine_http, local_cpu, named_tier
from warmer.tiers.engine_http import FAILURES, EngineHTTP, NotReadyError, once_more
from warmer.tiers.l1 import L1Server
from warmer.tiers.local_cpu import EngineWorker, Loaded

CHUNK = 4


class Server:
    """Answers as `lmcache server` does.

    Args:
        lose: Numbers of questions, from 1, whose answers are lost; before or after the server heeded the question.
        heeded: Which of the two.
        refuse: Lengths of prompts, in tokens, at which it fails.
    """

    def __init__(self, monkeypatch, lose=(), *, heeded=False, refuse=()):
        self.lose, self.heeded, self.refuse = set(lose), heeded, set(refuse)
        self.asked, self.used, self.held = 0, 0, 0
        self.loads = {}
        monkeypatch.setattr(EngineHTTP, "ask", lambda _, method, path, body=None, _secs=None: self(method, path, body))

    def __call__(self, method, path, body):
        self.asked += 1
        lost = self.asked in self.lose
        if lost and not self.heeded:
            raise NotReadyError(f"{method} {path}: 503 busy")
        answer = self.answer(method, path, body)
        if lost:
            raise NotReadyError(f"{method} {path}: no answer: the connection broke")
        return answer

    def answer(self, method, path, body):
        if path == "/status":
            l1 = {"memory_used_bytes": 100 * self.held, "memory_total_bytes": 1 << 40, "total_object_count": self.held}
            storage = {"l1_managers": {"a": l1}, "l1_eviction_controllers": {"a": {"trigger_watermark": 0.8}}}
            return {"chunk_size": CHUNK, "hash_algorithm": "blake3", "storage_manager": storage}
        if method == "POST":
            keys = len(body["token_ids"]) // CHUNK
            if len(body["token_ids"]) in self.refuse:
                raise EngineError(f"{method} {path}: 500")
            number = len(self.loads) + 1
            self.loads[number] = keys
            self.held = max(self.held, keys)
            return {"request_id": number}
        number = int(path.rpartition("/")[2])
        if number not in self.loads:
            raise EngineError(f"{method} {path}: 404")
        keys = self.loads.pop(number)  # told only once
        return {"status": "completed", "found_keys": keys, "total_keys": keys}


def loader(load_secs=30.0):
    server = L1Server("http://engine:8080", load_secs=load_secs, pause=lambda _: None)
    server.layout(Deadline.after(0.0))
    return PromptLoader(server, "http://engine:8080", frozenset({"m"}), 1)


def prompts(*chunks):
    return tuple(AskedPrompt(line, "m", "", array("I", range(CHUNK * count))) for line, count in enumerate(chunks, 1))


def test_one_answer_that_is_lost_costs_no_prompt(monkeypatch):
    every = Server(monkeypatch)
    assert [one.ended for one in loader()(prompts(5, 7))] == ["complete", "complete"]
    for heeded in (False, True):
        for number in range(2, every.asked + 1):
            Server(monkeypatch, {number}, heeded=heeded)
            loads = loader()(prompts(5, 7))
            assert [(one.ended, one.lacking) for one in loads] == [("complete", 0)] * 2, (heeded, number)


def test_a_prompt_for_which_the_server_fails_fails_alone(monkeypatch):
    Server(monkeypatch, refuse={3 * CHUNK})
    loads = loader()(prompts(1, 3, 2, 3, 1))
    assert [one.ended for one in loads] == ["complete", "engine", "complete", "engine", "complete"]
    assert [one.lacking for one in loads] == [0, 3, 0, 3, 0]


def test_a_server_is_given_up_after_several_prompts_in_a_row_and_what_came_before_is_told(monkeypatch):
    server = Server(monkeypatch)
    load = loader()
    assert [one.ended for one in load(prompts(1))] == ["complete"]
    server.refuse = {CHUNK}
    asked = server.asked
    loads = load(prompts(*[1] * (FAILURES + 4)))
    assert [one.ended for one in loads] == ["engine"] * (FAILURES + 4)
    assert server.asked - asked <= 3 * FAILURES  # nobody is asked for the rest
    with pytest.raises(EngineError, match=f"{FAILURES} loads failed one after the other"):
        load(prompts(1))


def test_a_server_that_stays_away_is_not_asked_for_ever(monkeypatch):
    Server(monkeypatch)
    load = loader(load_secs=0.01)
    Server(monkeypatch, range(10**6))
    (one,) = load(prompts(1))
    assert (one.ended, one.lacking) == ("engine", 1)


def test_an_answer_of_something_else_is_an_error_of_the_engine(monkeypatch):
    monkeypatch.setattr(EngineHTTP, "ask", lambda *_, **__: {"status": []})
    with pytest.raises(EngineError, match="not that of `lmcache server`"):
        L1Server("http://engine:8080").layout(Deadline.after(0.0))


ODD = {"/nested": b'{"a": ' + b"[" * 100_000, "/bomb": gzip.compress(b" " * 40_000_000), "/late": b"  "}


class Odd(BaseHTTPRequestHandler):
    """Answers what no engine does."""

    def do_GET(self):
        body = ODD[self.path]
        self.send_response(200)
        if self.path == "/bomb":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def odd():
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            with EngineHTTP(f"http://127.0.0.1:{server.server_port}") as engine:
                yield engine
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize(("path", "why"), [("/nested", "is no JSON object"), ("/bomb", "longer than 16777216 bytes")])
def test_an_answer_that_nests_or_unpacks_without_bounds_is_an_error(odd, path, why):
    with pytest.raises(EngineError, match=f"GET {odd.address}{path}: the answer .*{why}") as caught:
        odd.ask("GET", path)
    assert not isinstance(caught.value, NotReadyError)


def test_an_answer_that_does_not_end_in_time_is_none(odd):
    with pytest.raises(NotReadyError, match="did not end within 1e-09 s"):
        engine_http._content(odd._client.get(f"{odd.address}/late"), "GET /late", Deadline.after(1e-9))


def test_a_hiccup_begins_with_the_first_failure(monkeypatch):
    """A load that breaks off after a while has its time for another try."""
    monkeypatch.setattr(engine_http, "HICCUP_SECS", 0.05)
    answers = [NotReadyError("broke off"), 1]
    paused = []

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert once_more(ask, Deadline.after(60), paused.append) == 1
    assert len(paused) == 1
    answers += [NotReadyError("gone")] * 10**6
    with pytest.raises(NotReadyError):
        once_more(ask, Deadline.after(60), lambda _: None)


@pytest.fixture
def stage(tmp_path):
    declaration = named_tier(engine(), f'{{"type": "local_cpu", "staging": "{tmp_path}"}}').staging_of(PLACE, 0)
    one = StagingDirectory(declaration, EngineWorker(0, 1, frozenset({0}), {}, 1000), "http://engine:7000", keep=False)
    yield one
    one.close()


def staged(stage, number):
    chunk = ChunkRef(f"m@1@0@{number}@half", "path", "0" * 64, 4)
    draft = stage.draft(chunk.key, chunk.size)
    draft.lease.write(0, b"four")
    draft.publish()
    return [chunk]


def test_a_worker_is_given_up_after_several_loads_in_a_row(stage, monkeypatch):
    results = [EngineError("no"), EngineError("no"), Loaded(1, 1, ()), *[EngineError("no")] * FAILURES]

    def load(*_, **__):
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr("warmer.node.engine_memory.load", load)
    counts = [len(stage.load(staged(stage, number), 1.0)) for number in range(3 + FAILURES)]
    assert counts == [1, 1, 0, *[1] * FAILURES]
    with pytest.raises(EngineError, match=f"{FAILURES} loads failed one after the other, the last one: no"):
        stage.draft("m@1@0@99@half", 4)


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_one_answer_of_a_worker_that_is_lost_costs_no_chunk(stage, monkeypatch, lost):
    asked = []

    def ask(_, method, path, body=None, _secs=None):
        asked.append((method, path))
        if len(asked) == lost:
            raise NotReadyError("the connection broke")
        answers = {"/meta": {}, "/conf": {}}
        return answers.get(path, {"loaded_chunks": 1, "total_files": 1, "failed_keys": []})

    monkeypatch.setattr(EngineHTTP, "ask", ask)
    monkeypatch.setattr(engine_http, "WAIT_SECS", 0.01)
    monkeypatch.setattr(local_cpu, "_directory", lambda staging, _: staging.base_paths[0])
    monkeypatch.setattr(local_cpu, "_check", lambda *_: None)
    assert stage.load(staged(stage, 1), 5.0) == {}
    assert len(asked) == 4
