"""The schedule against a simulated fleet: nodes that work at any pace, fail, lag, and are lost at any moment."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmer.orders import Fetch, Receive, Window, total_bytes
from warmer.outcomes import INTERRUPTED, Copied, Failed, Present
from warmer.pace import Caps
from warmer.plan import PlannedChunk
from warmer.schedule import Schedule

sizes = st.lists(st.integers(0, 100), max_size=30)
ENDS = ("copied",) * 6 + ("present", "transport", "tier", "missing", INTERRUPTED)


def plan(chunk_sizes):
    return [PlannedChunk(f"key-{n}", f"path-{n}", "00" * 32, size) for n, size in enumerate(chunk_sizes)]


def outcome(kind, chunk):
    if kind == "copied":
        return Copied(chunk.key, chunk.size)
    if kind == "present":
        return Present(chunk.key, chunk.size)
    return Failed(chunk.key, chunk.size, kind, "no")


class Fleet:
    """Every chunk ends exactly once for each node that is to have it, and no bound is ever passed.

    What happens is drawn from a seed: a run takes milliseconds, so that thousands of fleets are tried.
    """

    def __init__(self, seed):
        chance = self.chance = random.Random(seed)
        self.window = Window(
            batch_chunks=chance.randint(1, 5),
            batch_bytes=chance.randint(1, 50),
            fetches=chance.randint(1, 2),
            receives=chance.randint(1, 2),
            bytes=chance.randint(1, 80),
            lots=chance.randint(1, 6),
            run_bytes=chance.choice([None, None, chance.randint(1, 100)]),
            fan=chance.randint(1, 3),
        )
        most = chance.choice([20, 100])
        self.plan = plan(chance.randint(0, most) for _ in range(chance.randint(0, 40)))
        self.bound = chance.choice([10**6, chance.randint(1, 400)])
        self.now = 0.0
        names = [f"node-{n}" for n in range(chance.choice([0, 1, 2, 3, 3, 4, 5, 20]))]
        self.roles = {name: name for name in names}
        ranks = chance.random() < 0.3
        groups = [frozenset(names[::2]), frozenset(names[1::2]), None]
        self.groups = {chunk.key: groups[n // 3 % 3] if ranks else None for n, chunk in enumerate(self.plan)}
        self.direct = chance.random() < 0.1
        self.reliable = chance.random() < 0.3
        self.pauses = [0.0, 0.1, 1.0] if self.reliable else [0.0, 0.1, 1.0, 1.0, 11.0]
        self.schedule = Schedule(
            dict.fromkeys(names, self.bound),
            lambda start: iter(self.plan[start:]),
            self.window,
            takers=(lambda chunk: self.groups[chunk.key]) if ranks else None,
            direct=self.direct,
        )
        self.unstarted = list(names)
        self.flying, self.objects, self.dead_sources = {}, {}, set()
        self.ended = {name: Counter() for name in names}
        self.fetched, self.excused, self.copied = Counter(), Counter(), 0
        self.released = set()
        self.vacant, self.numbers = {}, len(names)

    def play(self):
        chance = self.chance
        hung = {chance.choice(self.alive())} if self.alive() and chance.random() < 0.3 else set()
        for _ in range(chance.randint(0, 150)):
            self.start()
            able = [number for number, order in self.flying.items() if order.node not in hung]
            dice = chance.random()
            if able and dice < 0.55:
                self.finish(self.flying.pop(chance.choice(able)), well=self.reliable or chance.random() < 0.8)
            elif self.alive() and dice < 0.57:
                self.lose(chance.choice(self.alive()), keep=chance.random() < 0.5)
            elif self.vacant and dice < 0.6:
                self.abandon() if chance.random() < 0.5 else self.replace()
            elif hung and dice < 0.61:
                hung.clear()
            else:
                self.decide(chance.choice(self.pauses))
            self.check()
        self.complete()

    def wanted(self, name):
        role = self.roles[name]
        of = self.groups
        return Counter(chunk.key for chunk in self.plan if of[chunk.key] is None or role in of[chunk.key])

    def alive(self):
        return self.schedule.nodes

    def end(self, ended):
        for name, result in ended:
            self.ended[name][result.key] += 1
            assert self.ended[name][result.key] == 1, "nothing ends twice"

    def drop_released(self):
        for number in self.schedule.released():
            assert number not in self.released, "told once"
            self.released.add(number)
            self.objects.pop(number, None)

    def start(self):
        if self.unstarted and self.chance.random() < 0.3:
            name = self.unstarted.pop()
            if name in self.alive():
                self.schedule.started(name)

    def decide(self, secs):
        self.now += secs
        for order in self.schedule.orders(self.now):
            assert order.chunks
            assert order.number not in self.flying
            assert len(order.chunks) <= self.window.batch_chunks
            assert total_bytes(order.chunks) <= self.window.batch_bytes or len(order.chunks) == 1
            assert not {chunk.key for chunk in order.chunks} & set(self.ended[order.node])
            if isinstance(order, Receive):
                assert order.source in self.objects or order.source in self.dead_sources
                if order.source in self.objects:
                    assert tuple(self.objects[order.source][1]) == order.chunks
            else:
                self.fetched.update(chunk.key for chunk in order.chunks)
            self.flying[order.number] = order

    def finish(self, order, *, well):
        chance = self.chance
        kinds = ["copied" if well else chance.choice(ENDS) for _ in order.chunks]
        if isinstance(order, Fetch):
            results = [outcome(kind, chunk) for kind, chunk in zip(kinds, order.chunks, strict=True)]
            stored = [c for c, result in zip(order.chunks, results, strict=True) if isinstance(result, Copied)]
            self.copied += len(stored)
            shared = order.share and bool(stored) and (well or chance.random() < 0.9)
            if shared:
                self.objects[order.number] = (order.node, stored)
            for chunk, result in zip(order.chunks, results, strict=True):
                if not isinstance(result, Copied) or (order.share and not shared):
                    self.excused[chunk.key] += 1  # others have to fetch it themselves
            self.end(self.schedule.fetched(order.number, results, shared=shared, now=self.now))
        else:
            gone = order.source not in self.objects
            if gone or not well:
                kinds = ["undelivered"] * len(kinds) if gone or chance.random() < 0.3 else kinds
            results = [
                None if kind in ("undelivered", "transport", "missing") else outcome(kind, chunk)
                for kind, chunk in zip(kinds, order.chunks, strict=True)
            ]
            for chunk, result in zip(order.chunks, results, strict=True):
                self.excused[chunk.key] += result is None
            self.end(self.schedule.received(order.number, results, now=self.now, holder_lost=gone))
        with pytest.raises(KeyError):
            self.schedule.fetched(order.number, [], shared=False, now=self.now)
        self.drop_released()

    def lose(self, name, *, keep):
        self.flying = {number: order for number, order in self.flying.items() if order.node != name}
        for number, (holder, _) in list(self.objects.items()):
            if holder == name:
                del self.objects[number]
                self.dead_sources.add(number)
        for chunk in self.plan:
            self.excused[chunk.key] += 1
        rest = self.schedule.lost(name, keep_place=keep)
        assert name not in self.alive()  # at once, not when the rest was read
        rest = [chunk.key for chunk in rest]
        if keep:
            assert rest == []
            self.vacant[name] = None
        else:
            self.ended[name].update(rest)
            assert self.ended[name] == self.wanted(name)
        self.drop_released()
        with pytest.raises(KeyError):
            self.schedule.lost(name)

    def abandon(self):
        name, _ = self.vacant.popitem()
        self.ended[name].update(chunk.key for chunk in self.schedule.abandon(name))
        assert self.ended[name] == self.wanted(name)

    def replace(self):
        lost, _ = self.vacant.popitem()
        name = f"node-{self.numbers}"
        self.numbers += 1
        self.roles[name] = self.roles[lost]
        self.ended[name] = Counter()
        del self.ended[lost]
        self.schedule.replace(lost, name, self.bound)
        self.unstarted.append(name)
        for chunk in self.plan:
            self.excused[chunk.key] += 1

    def check(self):
        self.windows_hold()
        self.stores_hold()
        self.fetched_once_or_for_a_reason()

    def windows_hold(self):
        for name in self.alive():
            mine = [order for order in self.flying.values() if order.node == name]
            assert sum(isinstance(order, Fetch) for order in mine) <= self.window.fetches
            assert sum(isinstance(order, Receive) for order in mine) <= self.window.receives
            size = sum(total_bytes(order.chunks) for order in mine)
            assert size <= self.window.bytes or len([order for order in mine if total_bytes(order.chunks)]) == 1
        fetching = [total_bytes(order.chunks) for order in self.flying.values() if isinstance(order, Fetch)]
        if self.window.run_bytes is not None:
            assert sum(fetching) <= self.window.run_bytes or len([size for size in fetching if size]) == 1

    def stores_hold(self):
        used = self.schedule.store_bytes
        assert all(0 <= amount <= self.bound for amount in used.values())
        pinned = Counter()
        for holder, chunks in self.objects.values():
            pinned[holder] += total_bytes(tuple(chunks))
        for order in self.flying.values():
            if isinstance(order, Receive) and order.source in self.objects:
                pinned[order.node] += total_bytes(order.chunks)
        for name in self.alive():
            assert pinned[name] <= self.bound

    def fetched_once_or_for_a_reason(self):
        if self.direct:
            return
        assert self.copied == self.schedule.counts.fetched
        counts = self.schedule.counts
        if not counts.lags and not counts.slow_fetches and all(c.size <= self.bound for c in self.plan):
            for key, count in self.fetched.items():
                assert count <= 1 + self.excused[key]

    def complete(self):
        """Whatever happened, what is left can be carried out to the end."""
        while self.vacant:
            self.abandon()
        for name in self.alive():
            self.schedule.started(name)
        rounds = 0
        while not self.schedule.done:
            rounds += 1
            assert rounds < 2000, "it goes on for ever"
            self.decide(1.0)
            for number in list(self.flying):
                self.finish(self.flying.pop(number), well=True)
            self.check()
        for name, ended in self.ended.items():
            assert ended == self.wanted(name), name
        assert self.objects == {}, "nothing stays in the store"
        assert set(self.schedule.store_bytes.values()) <= {0}


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**32))
def test_any_fleet(seed):
    Fleet(seed).play()


MIB = 1024 * 1024


def begin(nodes, chunks, **options):
    names = nodes if isinstance(nodes, dict) else dict.fromkeys(nodes, 10**9)
    schedule = Schedule(names, lambda start: iter(chunks[start:]), **options)
    for name in names:
        schedule.started(name)
    return schedule


def carry_out(schedule, now=0.0, *, holds=(), step=0.01, most=100_000):
    """Let every order end well at once, but those of some nodes; returns what was ordered, and the time."""
    seen = []
    for _ in range(most):
        orders = [order for order in schedule.orders(now) if order.node not in holds]
        seen += orders
        now += step
        for order in orders:
            results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
            if isinstance(order, Fetch):
                schedule.fetched(order.number, results, shared=order.share, now=now)
            else:
                schedule.received(order.number, results, now=now)
        if schedule.done or (not orders and not holds):
            break
    return seen, now


def keys(orders, kind, node=None):
    return Counter(
        chunk.key
        for order in orders
        if isinstance(order, kind) and node in (None, order.node)
        for chunk in order.chunks
    )


def test_each_chunk_is_fetched_once_and_the_work_is_shared_out():
    chunks = plan([MIB] * 1000)
    names = [f"n{n}" for n in range(8)]
    schedule = begin(names, chunks, window=Window(batch_chunks=4))
    orders, _ = carry_out(schedule)
    assert schedule.done
    assert keys(orders, Fetch) == Counter(chunk.key for chunk in chunks)
    for name in names:
        assert keys(orders, Fetch, name) + keys(orders, Receive, name) == Counter(chunk.key for chunk in chunks)
        assert 80 <= sum(keys(orders, Fetch, name).values()) <= 170
    assert schedule.counts.fetched == 1000


def test_directly_every_node_fetches_for_itself():
    schedule = begin(["a", "b", "c"], plan([MIB] * 200), direct=True)
    orders, _ = carry_out(schedule)
    assert schedule.done
    assert schedule.counts.fetched == 600
    assert keys(orders, Receive) == Counter()
    assert not any(order.share for order in orders)


def test_one_node_leaves_nothing_in_the_store():
    schedule = begin({"a": 0}, plan([MIB] * 200))
    orders, _ = carry_out(schedule)
    assert schedule.done
    assert not any(order.share for order in orders)


def test_a_node_that_answers_nothing_is_left_behind_and_catches_up():
    chunks = plan([MIB] * 400)
    schedule = begin(dict.fromkeys(["a", "b", "c", "slow"], 16 * MIB), chunks, window=Window(batch_chunks=4))
    held, seen, now = [], Counter(), 0.0
    while sum(seen.values()) < 3 * 400:
        for order in schedule.orders(now):
            if order.node == "slow":
                held.append(order)
                continue
            seen.update(chunk.key for chunk in order.chunks)
            results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
            if isinstance(order, Fetch):
                schedule.fetched(order.number, results, shared=order.share, now=now)
            else:
                schedule.received(order.number, results, now=now)
        now += 0.1
        assert now < 300
    assert schedule.counts.lags == 1
    for order in held:
        results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
        if isinstance(order, Fetch):
            schedule.fetched(order.number, results, shared=order.share, now=now)
        else:
            schedule.received(order.number, results, now=now)
    orders, _ = carry_out(schedule, now)
    assert schedule.done
    slow = keys(held + orders, Fetch, "slow") + keys(held, Receive, "slow")
    assert slow == Counter(chunk.key for chunk in chunks)
    assert schedule.counts.fetched <= 2 * 400


def play(schedule, secs, until):
    """Orders take each node its own time, in seconds; returns when all has ended, and when for whom."""
    now, flying, last = 0.0, [], {}
    while not schedule.done:
        flying += [(now + secs[order.node], order) for order in schedule.orders(now)]
        now += 0.05
        assert now < until
        for at, order in [entry for entry in flying if entry[0] <= now]:
            flying.remove((at, order))
            last[order.node] = now
            results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
            if isinstance(order, Fetch):
                schedule.fetched(order.number, results, shared=order.share, now=now)
            else:
                schedule.received(order.number, results, now=now)
    return last


def test_slow_nodes_go_on_together_and_the_others_do_not_wait():
    chunks = plan([MIB] * 1600)
    names = [f"n{n}" for n in range(12)]
    secs = {name: 2.0 if name in ("n3", "n7", "n8") else 0.1 for name in names}
    schedule = begin(dict.fromkeys(names, 64 * MIB), chunks, window=Window(batch_chunks=4))
    last = play(schedule, secs, 2000)
    slow = {name: at for name, at in last.items() if secs[name] == 2.0}
    assert schedule.counts.lags == 3
    # 400 orders each, two at a time: 20 s, and the time until it was clear who is slow.
    assert max(at for name, at in last.items() if name not in slow) < 60
    assert min(slow.values()) > 200
    assert schedule.counts.fetched <= 2 * 1600


def test_nodes_of_much_the_same_pace_stay_together():
    chance = random.Random(5)
    names = [f"n{n}" for n in range(8)]
    secs = {name: chance.uniform(0.8, 1.1) for name in names}
    schedule = begin(dict.fromkeys(names, 64 * MIB), plan([MIB] * 1600), window=Window(batch_chunks=4))
    play(schedule, secs, 2000)
    assert schedule.counts.lags == 0
    assert schedule.counts.fetched == 1600


def test_when_all_are_slow_none_is_left_behind():
    schedule = begin(dict.fromkeys(["a", "b", "c", "d"], 8 * MIB), plan([MIB] * 100))
    for order in schedule.orders(0.0):
        results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
        schedule.fetched(order.number, results, shared=True, now=1.0)
    for second in range(2, 200):
        schedule.orders(float(second))
    assert schedule.counts.lags == 0


def test_a_fetch_that_takes_much_longer_than_others_is_given_to_another_node():
    chunks = plan([MIB] * 64)
    schedule = begin(["a", "b"], chunks, window=Window(batch_chunks=4, fetches=1))
    first = schedule.orders(0.0)
    slow = next(order for order in first if order.node == "a")
    orders, now = carry_out(schedule, holds={"a"}, most=1)
    for order in first:
        if order.node == "b":
            results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
            schedule.fetched(order.number, results, shared=order.share, now=0.1)
    orders, now = carry_out(schedule, now, holds={"a"}, step=1.0, most=30)
    assert schedule.counts.slow_fetches == 1
    assert keys(orders, Fetch, "b")[slow.chunks[0].key] == 1
    results = [Copied(chunk.key, chunk.size) for chunk in slow.chunks]
    assert schedule.fetched(slow.number, results, shared=True, now=now) == [("a", result) for result in results]
    assert slow.number in schedule.released()


@pytest.mark.parametrize(("kind", "fetches"), [("transport", 2), ("missing", 1)])
def test_what_cannot_be_fetched_is_tried_on_another_node_once(kind, fetches):
    schedule = begin(["a", "b", "c"], plan([10]))
    ended, nodes = [], []
    for now in range(5):
        for order in schedule.orders(float(now)):
            nodes.append(order.node)
            results = [Failed(chunk.key, chunk.size, kind, "no") for chunk in order.chunks]
            ended += schedule.fetched(order.number, results, shared=False, now=float(now))
    assert schedule.done
    assert len(nodes) == len(set(nodes)) == fetches
    assert sorted(node for node, _ in ended) == ["a", "b", "c"]


def test_a_second_node_helps_the_one_that_could_not_fetch():
    schedule = begin(["a", "b"], plan([10]))
    (order,) = schedule.orders(0.0)
    failed = [Failed(chunk.key, chunk.size, "transport", "no") for chunk in order.chunks]
    assert schedule.fetched(order.number, failed, shared=False, now=0.0) == []
    orders, _ = carry_out(schedule)
    assert [(type(each).__name__, each.node == order.node) for each in orders] == [("Fetch", False), ("Receive", True)]
    assert schedule.done


def test_a_full_disk_is_one_nodes_matter():
    schedule = begin(["a", "b"], plan([10]))
    (order,) = schedule.orders(0.0)
    ended = schedule.fetched(order.number, [Failed("key-0", 10, "no_room", "no")], shared=False, now=0.0)
    assert [node for node, _ in ended] == [order.node]
    orders, _ = carry_out(schedule)
    assert [each.node == order.node for each in orders] == [False]
    assert schedule.done


def test_what_a_lost_node_had_left_in_the_store_is_fetched_again_by_another():
    schedule = begin(["a", "b", "c"], plan([10]))
    (order,) = schedule.orders(0.0)
    schedule.fetched(order.number, [Copied("key-0", 10)], shared=True, now=0.0)
    receives = schedule.orders(0.0)
    assert {type(each) for each in receives} == {Receive}
    assert list(schedule.lost(order.node)) == []  # its own had ended
    assert schedule.released() == [order.number]
    for each in receives:
        assert schedule.received(each.number, [None], now=1.0, holder_lost=True) == []
    orders, _ = carry_out(schedule, 1.0)
    assert sorted(type(each).__name__ for each in orders) == ["Fetch", "Receive"]
    assert schedule.done
    assert schedule.counts.fetched == 2


def test_a_node_that_joins_in_place_of_a_lost_one_is_given_everything():
    chunks = plan([MIB] * 100)
    schedule = begin(["a", "b"], chunks, window=Window(batch_chunks=4))
    orders, now = carry_out(schedule, most=4)
    assert list(schedule.lost("b", keep_place=True)) == []
    orders, now = carry_out(schedule, now)
    assert not schedule.done
    assert schedule.vacant == ["b"]
    schedule.replace("b", "new", 10**9)
    schedule.started("new")
    orders, _ = carry_out(schedule, now)
    assert schedule.done
    assert keys(orders, Fetch, "new") + keys(orders, Receive, "new") == Counter(chunk.key for chunk in chunks)


def test_caps_bound_what_is_ordered_in_any_time():
    schedule = begin(["a", "b"], plan([MIB] * 400), caps=Caps(run=10 * MIB, node=8 * MIB))
    ordered, now = [], 0.0
    while not schedule.done:
        for order in schedule.orders(now):
            ordered.append((now, order))
            results = [Copied(chunk.key, chunk.size) for chunk in order.chunks]
            if isinstance(order, Fetch):
                schedule.fetched(order.number, results, shared=order.share, now=now)
            else:
                schedule.received(order.number, results, now=now)
        now += 0.1
    # 400 MiB reach each node, at 8 MiB a second: no faster, and hardly slower.
    assert 48 <= now <= 60
    for at, _ in ordered:
        second = [order for then, order in ordered if at <= then < at + 1]
        assert sum(total_bytes(order.chunks) for order in second if isinstance(order, Fetch)) <= 30 * MIB
        for name in ("a", "b"):
            assert sum(total_bytes(order.chunks) for order in second if order.node == name) <= 24 * MIB


def test_a_chunk_that_no_store_takes_is_fetched_by_each_for_itself():
    chunks = plan([10, 10**12, 10])
    schedule = begin(["a", "b"], chunks, window=Window())
    orders, _ = carry_out(schedule)
    assert schedule.done
    for name in ("a", "b"):
        assert sum(keys(orders, Fetch, name).values()) + sum(keys(orders, Receive, name).values()) == 3
    assert not any(order.share for order in orders if any(chunk.size > 10**9 for chunk in order.chunks))


def test_only_those_that_are_to_have_a_chunk_take_part_in_it():
    chunks = plan([10] * 8)
    even, odd = frozenset({"a", "b"}), frozenset({"c"})
    schedule = begin(["a", "b", "c"], chunks, takers=lambda chunk: even if int(chunk.key[4:]) % 2 == 0 else odd)
    orders, _ = carry_out(schedule)
    assert schedule.done
    for name, parity in (("a", 0), ("b", 0), ("c", 1)):
        mine = keys(orders, Fetch, name) + keys(orders, Receive, name)
        assert mine == Counter(f"key-{n}" for n in range(8) if n % 2 == parity)
    assert schedule.counts.fetched == 8


@given(sizes)
def test_a_schedule_reads_no_further_than_its_windows(chunk_sizes):
    read = 0

    def chunks(start):
        nonlocal read
        for chunk in plan(chunk_sizes)[start:]:
            read += 1
            yield chunk

    schedule = Schedule({"a": 1000, "b": 1000}, chunks, Window(batch_chunks=2, batch_bytes=100, lots=2))
    schedule.started("a")
    schedule.started("b")
    schedule.orders(0.0)
    assert read <= 5  # four under way, and one looked at


def test_no_nodes_and_no_chunks_are_done_at_once():
    assert begin([], plan([1])).done
    assert begin(["node"], []).done


def test_a_window_without_room_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Window(lots=0)
    with pytest.raises(ValueError, match="at least one"):
        Window(run_bytes=0)
