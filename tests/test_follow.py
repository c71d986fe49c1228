"""A consumer that loses nothing: the decisions, against a daemon and a network that do their worst (pure, Hypothesis)."""

import itertools
from collections import deque

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from scripted_daemon import HOST, PARTITION, Ledger, ScriptedDaemon

from feed.acks import Acks
from feed.ask import Ask
from feed.assembler import Assembler, Diff, Gap
from feed.follow import Deliver, Follower, Timing, Warn
from feed.pages import parse_page

TIMING = Timing()


class World:
    """Three topics, each in order, any of them ahead of the others; a follower at their end; a clock."""

    def __init__(self, position=None, room=1 << 20, per_page=2):
        self.daemon = ScriptedDaemon(per_page)
        numbers = itertools.count(1)
        self.follower = Follower("me", lambda: f"id{next(numbers)}", TIMING, room, lambda low, high: high)
        self.ledger = Ledger(self.daemon)
        self.topics = {"live": deque(), "replay": deque(), "answers": deque(), "requests": deque()}
        self.now = 0.0
        self.asked, self.warned = [], []
        self.up = False
        self.follower.add(HOST, PARTITION, position, self.now)

    def act(self, actions):
        for action in actions:
            match action:
                case Deliver(diff):
                    self.ledger.take(diff)
                case Warn(text):
                    self.warned.append(text)
                case Ask():
                    self.asked.append(action)
                    self.topics["requests"].append(action)

    # ---- the network

    def connect(self):
        """Away and back: what was on its way is lost."""
        self.follower.disconnected()
        for topic in self.topics.values():
            topic.clear()
        self.up = True
        self.act(self.follower.connected(self.now))

    def arrive(self, topic):
        waiting = self.topics[topic]
        if not waiting:
            return
        what = waiting.popleft()
        if topic == "requests":
            answer, pages = self.daemon.request(what.verb, what.document)
            if what.verb == "baseline" or (what.verb == "replay" and answer["status"] == "ok"):
                self.topics["replay"].extend(pages)
            self.topics["answers"].append(answer)
        elif topic == "answers":
            self.act(self.follower.answered(what["id"], what, self.now))
        else:
            self.act(self.follower.page(parse_page(what), len(what), self.now, live=topic == "live"))

    def publish(self):
        self.topics["live"].extend(self.daemon.publish())

    def pass_time(self, seconds):
        self.now += seconds
        self.act(self.follower.tick(self.now))

    def settle(self, order=("requests", "answers", "replay", "live"), *, reconnect=True):
        """The faults are over: everything arrives. Raises unless the consumer then has what the daemon has.

        Without `reconnect` nothing tells it of what it lost but one more diff.
        """
        if reconnect:
            self.connect()
        else:
            self.daemon.commit(1)
        for _ in range(400):
            self.publish()
            for topic in order:
                while self.topics[topic]:
                    self.arrive(topic)
            done = self.daemon.published == self.daemon.head
            if done and reconnect:
                self.act(self.follower.state(HOST, PARTITION, self.daemon.state(), self.now))
            if done and self.ledger.is_there() and not any(self.topics.values()):
                return
            if done:
                self.pass_time(5.0)
        raise AssertionError(f"{self.ledger.position}, but the daemon is at {self.daemon.epoch} {self.daemon.head}")


TOPIC = st.sampled_from(["live", "live", "replay", "replay", "answers", "requests"])
STEP = st.one_of(
    st.tuples(st.just("commit"), st.integers(0, 5), st.sampled_from([0, 0, 0, 3])),
    st.tuples(st.just("publish")),
    st.tuples(st.just("arrive"), TOPIC, st.integers(1, 4)),
    st.tuples(st.just("all"), TOPIC),
    st.tuples(st.just("lose"), TOPIC),
    st.tuples(st.just("twice"), TOPIC),
    st.tuples(st.just("again"), st.integers(1, 5)),
    st.tuples(st.just("squash")),
    st.tuples(st.just("trim"), st.integers(0, 2)),
    st.tuples(st.just("epoch"), st.integers(0, 5)),
    st.tuples(st.just("restart"), st.integers(0, 3)),
    st.tuples(st.just("connect")),
    st.tuples(st.just("dropped")),
    st.tuples(st.just("online")),
    st.tuples(st.just("state")),
    st.tuples(st.just("time"), st.sampled_from([0.5, 3.0, 12.0, 40.0, 400.0])),
)

STEPS = st.integers(0, 80).flatmap(
    lambda least: st.lists(STEP, min_size=least, max_size=least + 20)
)  # else most are short


def happen(world, name, *more):
    daemon, topics = world.daemon, world.topics
    match name:
        case "commit":
            daemon.commit(*more)
        case "publish":
            world.publish()
        case "arrive":
            for _ in range(more[1]):
                world.arrive(more[0])
        case "all":
            while topics[more[0]]:
                world.arrive(more[0])
        case "lose":
            if topics[more[0]]:
                topics[more[0]].popleft()
        case "twice":
            if topics[more[0]]:
                topics[more[0]].appendleft(topics[more[0]][0])
        case "again":  # the cursor was lost, or a PUBACK: the publisher sends diffs once more
            behind = [entry.seq for entry in daemon.journal if entry.seq <= daemon.published]
            if len(behind) > more[0]:
                daemon.published = behind[-1 - more[0]]
        case "squash":
            daemon.squash()
        case "trim":
            daemon.trim(*more)
        case "epoch":
            daemon.new_epoch(*more)
        case "restart":  # replays end in the middle
            for _ in range(min(more[0], len(topics["replay"]))):
                topics["replay"].pop()
            topics["requests"].clear()
        case "connect":
            world.connect()
        case "dropped":
            topics["live"].clear()
            world.act(world.follower.dropped(world.now))
        case "online":
            world.follower.online(HOST, world.now)
        case "state":
            world.act(world.follower.state(HOST, PARTITION, daemon.state(), world.now))
        case "time":
            world.pass_time(*more)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    STEPS,
    st.sampled_from([200, 1 << 20]),
    st.integers(1, 3),
    st.booleans(),
    st.permutations(["requests", "answers", "replay", "live"]),
    st.booleans(),
)
def test_nothing_is_lost_doubled_or_out_of_order(steps, room, per_page, known, order, reconnect):
    """The ledger refuses whatever does not follow; in the end it must hold what the daemon holds."""
    world = World(("e1", 1) if known else None, room, per_page)
    if known:
        world.ledger.position, world.ledger.files = ("e1", 1), list(world.daemon.files)
    world.connect()
    for step in steps:
        happen(world, *step)
        assert world.follower.held <= room
        assert world.follower.position(HOST, PARTITION) == world.ledger.position
    note(f"asked: {[(ask.verb, ask.document.get('since')) for ask in world.asked]}")
    world.settle(order, reconnect=reconnect)


def settled(**options):
    world = World(**options)
    world.settle()
    return world


def test_begins_with_a_baseline_and_goes_on_live():
    world = settled()
    assert [ask.verb for ask in world.asked] == ["baseline"]
    assert world.ledger.baselines == 1  # the same one came on `changes` as well
    world.daemon.commit(2)
    world.publish()
    while world.topics["live"]:
        world.arrive("live")
    assert world.ledger.is_there()
    assert len(world.asked) == 1


def test_begins_where_it_stopped():
    world = World(("e1", 1))
    world.ledger.position, world.ledger.files = ("e1", 1), list(world.daemon.files)
    world.daemon.commit(2)
    world.daemon.commit(1)
    world.settle()
    assert [(ask.verb, ask.document["since"]) for ask in world.asked] == [("replay", {"epoch": "e1", "seq": 1})]
    assert (world.ledger.baselines, world.ledger.diffs) == (0, 2)


def drain(world, *topics):
    for topic in topics:
        while world.topics[topic]:
            world.arrive(topic)


def lose_one(world, files=2):
    world.daemon.commit(files)
    world.publish()
    world.topics["live"].clear()


def test_a_lost_diff_is_replayed_and_what_came_meanwhile_follows():
    world = settled()
    lose_one(world)
    for _ in range(3):
        world.daemon.commit(3)
        world.publish()
    drain(world, "live")
    assert world.ledger.position == ("e1", 1)
    assert world.follower.held > 0
    assert [ask.verb for ask in world.asked[1:]] == ["replay"]
    drain(world, "requests", "replay", "answers")  # the pages before the answer
    assert world.ledger.is_there()
    assert world.follower.held == 0
    world.pass_time(1000)
    assert len(world.asked) == 2, "done is done"


def test_a_journal_that_does_not_reach_back_costs_a_baseline():
    world = settled()
    lose_one(world)
    lose_one(world)
    world.daemon.trim(0)
    world.daemon.commit(1)
    world.publish()
    drain(world, "live", "requests", "answers")
    assert [ask.verb for ask in world.asked[1:]] == ["replay", "baseline"]
    drain(world, "requests", "answers", "replay")
    assert world.ledger.is_there()
    assert world.ledger.baselines == 2
    # the live diff that waited is covered by the baseline
    assert world.follower.held == 0


def test_another_epoch_takes_the_baseline_that_came_by_itself():
    world = settled()
    world.daemon.new_epoch()
    world.publish()
    world.daemon.commit(2)
    world.publish()
    drain(world, "live")
    assert world.ledger.position == ("e1", 1), "only the daemon's word makes us leave an epoch"
    drain(world, "requests", "answers")
    assert world.ledger.is_there()
    assert [ask.verb for ask in world.asked[1:]] == ["replay", "replay"]
    drain(world, "requests", "answers")
    assert len(world.asked) == 3


def test_messages_of_an_epoch_that_is_over_change_nothing():
    world = settled()
    old = world.daemon.pages(None, 9, (1, 2), baseline=True)
    world.daemon.new_epoch()
    world.settle()
    before = world.ledger.position
    world.topics["live"].extend(old)
    drain(world, "live", "requests", "answers", "replay")
    world.pass_time(100)
    drain(world, "requests", "answers", "replay")
    assert world.ledger.position == before
    assert world.follower.held == 0, "the daemon was asked, and it is nothing"


def test_a_squashed_diff_is_an_ordinary_one_and_one_across_is_a_gap():
    world = settled()
    world.daemon.commit(1)
    world.daemon.commit(1)
    world.daemon.squash()
    world.publish()
    drain(world, "live")
    assert world.ledger.is_there()
    assert len(world.asked) == 1
    # 3 -> 4 arrives, its acknowledgement does not reach the daemon, which squashes 3 -> 5
    world.daemon.commit(1)
    world.publish()
    drain(world, "live")
    world.daemon.published = 3
    world.daemon.commit(1)
    world.daemon.squash()
    world.publish()
    drain(world, "live", "requests", "answers", "requests", "answers", "replay")
    assert world.ledger.is_there()
    assert [ask.verb for ask in world.asked[1:]] == ["replay", "baseline"]


def test_silence_is_asked_again_ever_slower_with_new_ids():
    world = World()
    world.connect()
    times = []
    for _ in range(4000):
        before = len(world.asked)
        world.pass_time(0.5)
        if len(world.asked) > before:
            times.append(world.now)
    assert len({ask.id for ask in world.asked}) == len(world.asked)
    assert 8 <= len(world.asked) <= 20
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert waits == sorted(waits)
    assert waits[-1] <= TIMING.longest + TIMING.cap + 1
    assert len(world.warned) == 1
    world.follower.online(HOST, world.now)  # the daemon is there: no long wait
    since = world.now
    world.topics["requests"].clear()
    before = len(world.asked)
    while len(world.asked) == before:
        world.pass_time(0.5)
    assert world.now - since < 10


def test_who_hears_no_answer_is_told_where_to_look():
    world = World()
    world.connect()
    for _ in range(200):
        world.pass_time(1)
    (text,) = world.warned
    assert all(word in text for word in ("daemon running", "request/baseline", "response/baseline", "ACL"))


@pytest.mark.parametrize("verb", ["baseline", "replay"])
def test_pages_that_were_granted_and_never_come_are_told_once(verb):
    """What a broker does whose access list does not let this login read the topic: it takes the subscription, silently."""
    world = World() if verb == "baseline" else settled()
    if verb == "replay":
        lose_one(world)
    world.connect()
    for _ in range(6):
        drain(world, "requests", "answers")
        world.topics["replay"].clear()
        world.pass_time(TIMING.stall - 1)
        assert len(world.warned) <= 1
        for _ in range(30):
            world.pass_time(10)
            drain(world, "requests", "answers")
            world.topics["replay"].clear()
    assert {ask.verb for ask in world.asked[1 if verb == "replay" else 0 :]} == {verb}
    (text,) = world.warned
    assert all(word in text for word in (verb, "granted", f"snapfeed/{HOST}/{PARTITION}/replay/me", "ACL", "name"))


@pytest.mark.parametrize(
    "why", ["nothing is missing", "some came", "they came before the answer", "the daemon restarted"]
)
def test_pages_that_do_not_come_for_a_reason_are_not_told(why):
    world = settled()
    if why != "nothing is missing":
        lose_one(world, 6)
    world.connect()
    drain(world, "requests")
    if why == "they came before the answer":
        world.arrive("replay")
    drain(world, "answers")
    if why == "some came":
        world.arrive("replay")
    if why == "the daemon restarted":
        world.follower.online(HOST, world.now)
    world.topics["replay"].clear()
    asked = len(world.asked)
    world.pass_time(TIMING.stall + 1)
    world.pass_time(TIMING.cap)
    assert (len(world.asked) > asked) == (why != "nothing is missing")
    assert world.warned == []


def test_a_replay_that_stops_midway_is_asked_for_again():
    world = settled()
    for _ in range(5):
        lose_one(world, 4)
    world.connect()
    drain(world, "requests", "answers")
    for _ in range(5):
        world.arrive("replay")
    reached = world.ledger.position
    assert reached == ("e1", 3)
    world.topics["replay"].clear()
    world.pass_time(TIMING.stall - 1)
    assert len(world.asked) == 2
    world.pass_time(2)
    world.pass_time(TIMING.first)
    assert world.asked[-1].document["since"] == {"epoch": "e1", "seq": 3}
    drain(world, "requests", "answers", "replay")
    assert world.ledger.is_there()


def test_pages_that_keep_coming_are_progress():
    world = World()
    world.daemon.commit(100)
    world.connect()
    drain(world, "requests", "answers")
    while world.topics["replay"]:
        world.pass_time(TIMING.stall * 0.9)
        world.arrive("replay")
    assert world.ledger.is_there()
    assert len(world.asked) == 1


def test_a_refusal_is_told_once_and_tried_again():
    world = World()
    world.connect()
    for _ in range(5):
        ask = world.topics["requests"].popleft()
        document = {"id": ask.id, "status": "error", "error": "unmounted\x1b[2J", "data": None}
        world.act(world.follower.answered(ask.id, document, world.now))
        world.pass_time(TIMING.cap)
    (warning,) = world.warned
    assert "unmounted" in warning
    assert warning.isprintable()
    # it is mounted again: the state says so, and nobody waits
    state = {**world.daemon.state(), "state": "unmounted"}
    ask = world.topics["requests"].popleft()
    world.act(world.follower.answered(ask.id, {"id": ask.id, "status": "error", "error": "x", "data": None}, world.now))
    world.act(world.follower.state(HOST, PARTITION, state, world.now))
    assert not world.topics["requests"]
    world.act(world.follower.state(HOST, PARTITION, world.daemon.state(), world.now))
    drain(world, "requests", "answers", "replay")
    assert world.ledger.is_there()


def test_the_last_diff_lost_before_silence_shows_by_the_state():
    world = settled()
    lose_one(world)
    world.act(world.follower.state(HOST, PARTITION, world.daemon.state(), world.now))
    world.pass_time(TIMING.behind - 1)
    assert len(world.asked) == 1
    world.pass_time(2)
    drain(world, "requests", "answers", "replay")
    assert world.ledger.is_there()


@pytest.mark.parametrize("room", [300, 3000])
def test_what_waits_is_bounded_and_comes_by_another_replay(room):
    world = settled(room=room)
    lose_one(world)
    for _ in range(20):
        world.daemon.commit(3)
        world.publish()
        drain(world, "live")
        assert world.follower.held <= room
    drain(world, "requests", "replay")  # since 1, to the end of then
    for _ in range(5):
        world.daemon.commit(3)
        world.publish()
        drain(world, "live")
    drain(world, "answers", "requests", "answers", "replay")
    world.pass_time(TIMING.cap)
    drain(world, "requests", "answers", "replay")
    assert world.ledger.is_there()
    assert [ask.verb for ask in world.asked[1:]].count("baseline") == 0


@pytest.mark.parametrize("room", [200, 1 << 20])
def test_what_came_during_a_replay_and_cannot_go_after_it_is_asked_for_too(room):
    """2 is lost, asked for; before its replay comes, 3 is lost and 4 is there (and with little room dropped). Then silence."""
    world = settled(room=room)
    lose_one(world)
    world.connect()
    drain(world, "requests")
    lose_one(world)
    world.daemon.commit(2)
    world.publish()
    drain(world, "live")
    assert (world.follower.held == 0) == (room == 200)
    drain(world, "answers", "replay")
    assert world.ledger.position == ("e1", 2)
    assert world.asked[-1].document["since"] == {"epoch": "e1", "seq": 2}
    drain(world, "requests", "answers", "replay")
    assert world.ledger.is_there()
    world.pass_time(1000)
    assert len(world.asked) == 3


def test_a_baseline_page_is_not_the_page_of_the_diff_with_its_number():
    """The pages of diff 2 and of the baseline at 2 have the same keys, and as many pages."""
    world = World(per_page=2)
    world.daemon.commit(3)
    diff = world.daemon.journal[1]
    world.connect()
    drain(world, "requests", "answers")
    world.topics["replay"].clear()
    base = world.daemon.pages(None, 2, tuple(world.daemon.files)[:4], baseline=True)
    world.daemon.truth["e1", 2] = tuple(world.daemon.files)[:4]
    plain = world.daemon.pages(1, 2, diff.files)
    assert len(base) == len(plain) == 2
    for live, page in ((False, plain[0]), (True, plain[0]), (False, base[0]), (True, plain[1]), (False, base[1])):
        world.act(world.follower.page(parse_page(page), 1, 0.0, live=live))
    assert world.ledger.position == ("e1", 2)


def test_a_squashed_diff_does_not_complete_the_one_it_replaced():
    """Both have the number 4 and two pages; who mixes them gets neither."""
    world = settled()
    one = world.daemon.pages(3, 4, (90, 91, 92))
    squashed = world.daemon.pages(1, 4, (80, 81, 90))
    assembler = Assembler()
    assembler.add(parse_page(world.daemon.pages(None, 1, (1,), baseline=True)[0]))
    found = []
    for page in (one[0], squashed[0], squashed[1]):
        found += assembler.add(parse_page(page))
    (diff,) = found
    assert isinstance(diff, Diff)
    assert [document["n"] for document in diff.documents] == [80, 81, 90]


def test_without_a_name_gaps_are_told():
    daemon = ScriptedDaemon()
    assembler = Assembler()
    for _ in range(3):
        daemon.commit(3)
    found = []
    for number in range(4):
        pages = daemon.publish()
        if number != 2:
            for page in pages + pages:
                found += assembler.add(parse_page(page))
    assert [type(item) for item in found] == [Diff, Diff, Gap, Diff]
    assert (found[2].seq, found[2].parent, found[2].next_seq) == (2, 3, 4)


# ---- acknowledgements


def acks():
    numbers = itertools.count(1)
    return Acks("me", lambda: f"a{next(numbers)}", every=1.0, patience=10.0)


def test_acks_are_coalesced_one_at_a_time_the_latest_wins():
    made = acks()
    made.connected(0.0)
    (first,) = made.commit("h", "p", ("e", 1), 0.0)
    assert first == Ask("h", "ack", {"id": "a1", "partition": "p", "consumer": "me", "epoch": "e", "seq": 1})
    for seq in range(2, 50):
        assert made.commit("h", "p", ("e", seq), 0.1) == []
    assert [ask.document["seq"] for ask in made.commit("h", "q", ("e", 7), 0.1)] == [7]
    made.answered("a1", 0.2, OK)
    assert made.tick(0.3) == [], "not more often than once a second"
    (second,) = made.tick(1.0)
    assert second.document["seq"] == 49
    made.answered(second.id, 1.1, OK)
    assert made.tick(5.0) == []


OK = {"status": "ok", "error": None, "data": {"partition": "p", "consumer": "me", "epoch": "e", "seq": 1}}
NEVER = {"status": "error", "error": "epoch 'e' is not ...", "data": {"partition": "p", "epoch": "f", "seq": 9}}
LATER = [
    {"status": "error", "error": "too many commands; slow down", "data": None},
    {"status": "error", "error": "p: the disk is full", "data": None},
    {"status": "error", "error": "unknown partition 'p'"},
    {},
]


@pytest.mark.parametrize("refusal", LATER)
def test_an_ack_that_was_refused_for_now_is_sent_again_ever_slower(refusal):
    """On a quiet partition no further diff would bring the next one."""
    made, now, sent = acks(), 0.0, []
    made.connected(now)
    asks = made.commit("h", "p", ("e", 1), now)
    while now < 300:
        for ask in asks:
            sent.append(now)
            made.answered(ask.id, now, refusal)
        now += 0.25
        asks = made.tick(now)
    waits = [b - a for a, b in itertools.pairwise(sent)]
    assert waits[:6] == [1, 2, 4, 8, 16, 32]
    assert set(waits[6:]) == {60}
    (ask,) = made.tick(now + 60)
    made.answered(ask.id, now + 60, OK)
    assert made.tick(now + 1000) == []


def test_acks_that_are_lost_are_sent_again_and_refused_ones_are_not():
    made = acks()
    assert made.commit("h", "p", ("e", 1), 0.0) == []
    (first,) = made.connected(0.0)
    assert made.tick(9.0) == []
    assert made.tick(10.0) == []
    (second,) = made.tick(11.0)
    assert second.id != first.id
    made.answered(first.id, 11.0, OK)  # an answer to one that was given up
    made.answered(second.id, 11.0)
    assert made.tick(12.0) == []
    (third,) = made.tick(13.0)
    made.disconnected()
    (fourth,) = made.connected(13.0)
    made.answered(third.id, 13.0, OK)
    made.answered(fourth.id, 13.0, NEVER)
    assert made.tick(100.0) == []


def test_one_host_is_not_flooded():
    """A daemon takes 20 commands a second, 50 at once. Everybody gets a turn."""
    made, numbers = acks(), itertools.count()
    follower = Follower("me", lambda: f"id{next(numbers)}", TIMING)
    for number in range(200):
        follower.add(HOST, f"p{number}", None, 0.0)
        made.commit(HOST, f"p{number}", ("e", 1), 0.0)
    asked, sent = list(follower.connected(0.0)), list(made.connected(0.0))
    assert (len(asked), len(sent)) == (20, 10)
    now = 0.0
    while now < 60:
        now += 0.25
        asked += follower.tick(now)
        more = made.tick(now)
        for ask in more:
            made.answered(ask.id, now, OK)
            made.commit(HOST, ask.document["partition"], ("e", 2 + int(now)), now)
        sent += more
        assert len(sent) <= 11 + 5 * now
    first = [ask.document["partition"] for ask in asked if isinstance(ask, Ask)][:200]
    assert len(set(first)) == 200
    assert len({ask.document["partition"] for ask in sent}) == 200


def test_a_request_names_what_the_contract_names():
    world = settled()
    lose_one(world)
    world.connect()
    ask = world.asked[-1]
    assert set(ask.document) == {"id", "partition", "consumer", "since"}
    assert set(world.asked[0].document) == {"id", "partition", "consumer"}
