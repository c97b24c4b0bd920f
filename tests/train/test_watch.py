"""When the driver interferes with a fit: every transition of the watch, without Ray and without a clock."""

import random
from dataclasses import replace

import pytest

from orchestrator.train.watch import (
    NODES_EVERY_S,
    REQUEST_EVERY_S,
    SETTLED_S,
    START_TIMEOUT_S,
    STARVED_TIMEOUT_S,
    Decision,
    Facts,
    NodeFacts,
    Watch,
)

BEGIN = 1000.0  # a monotonic clock starts anywhere
WORKING = NodeFacts(started=True)
SAVE_FOR_FEED = (Decision.SAVE_FOR_LOST_FEED, Decision.RELEASE_CAPACITY)
SAVE_TO_GROW = (Decision.SAVE_TO_GROW, Decision.RELEASE_CAPACITY)


class Driver:
    """Asks a watch as the driver does: a look at the nodes every so often, of which only what it needs is known."""

    def __init__(self):
        self.now, self.watch = BEGIN, Watch.begin(BEGIN)

    def look(self, nodes, after_s=NODES_EVERY_S):
        self.now += after_s
        assert self.watch.needs_nodes(self.now)
        if not self.watch.needs_growth(nodes.started, nodes.lost):
            nodes = replace(nodes, could_grow=False)
        if not self.watch.needs_capacity(self.now, nodes.started, nodes.lost):
            nodes = replace(nodes, capacity="unavailable")
        self.watch, decisions = self.watch.step(Facts(now=self.now, nodes=nodes))
        return decisions

    def looks(self, nodes, seconds):
        """So many seconds of looks that show the same; the decisions, by seconds since the beginning of them."""
        start, found = self.now, {}
        while self.now + NODES_EVERY_S <= start + seconds:
            if decisions := self.look(nodes):
                found[self.now - start] = decisions
        return found


@pytest.fixture
def driver():
    return Driver()


# what ends a fit, whatever the nodes are


@pytest.mark.parametrize("facts", [{"over": True}, {"ended": True}, {"over": True, "ended": True}])
def test_a_fit_that_ended_is_over(facts):
    watch = Watch.begin(BEGIN)
    assert watch.step(Facts(now=BEGIN, **facts)) == (watch, (Decision.FIT_OVER,))


def test_a_cancelled_run_ends_whatever_else_is_known():
    watch, lost = Watch.begin(BEGIN), NodeFacts(started=False, lost="workers")
    everything = Facts(now=BEGIN + 1e6, cancelled=True, over=True, ended=True, nodes=lost)
    assert watch.step(everything) == (watch, (Decision.CANCEL,))


def test_the_end_of_a_fit_comes_before_lost_nodes_and_growth():
    watch = Watch.begin(BEGIN)
    for nodes in (NodeFacts(started=True, lost="workers"), NodeFacts(started=True, could_grow=True)):
        assert watch.step(Facts(now=BEGIN + 1e6, over=True, nodes=nodes)) == (watch, (Decision.FIT_OVER,))


def test_between_two_looks_at_the_nodes_the_driver_waits():
    watch = Watch.begin(BEGIN)
    assert watch.step(Facts(now=BEGIN + 1e6)) == (watch, ())


# how often it looks


def test_it_looks_at_once_and_then_every_two_seconds(driver):
    assert driver.watch.needs_nodes(BEGIN)
    driver.look(WORKING, after_s=0)
    assert not driver.watch.needs_nodes(BEGIN + NODES_EVERY_S - 0.01)
    assert driver.watch.needs_nodes(BEGIN + NODES_EVERY_S)
    assert NODES_EVERY_S == 2.0


# workers that do not start


def test_workers_that_do_not_start_are_reported_once(driver):
    found = driver.looks(NodeFacts(started=False), seconds=4 * START_TIMEOUT_S)
    assert found == {START_TIMEOUT_S + NODES_EVERY_S: (Decision.WARN_NOT_STARTED,)}
    assert START_TIMEOUT_S == 90.0


def test_workers_that_start_late_but_in_time_are_not_reported(driver):
    assert driver.looks(NodeFacts(started=False), seconds=START_TIMEOUT_S) == {}
    assert driver.looks(WORKING, seconds=START_TIMEOUT_S) == {}


def test_a_fit_that_has_not_started_neither_grows_nor_requests_capacity(driver):
    asked_for = NodeFacts(started=False, could_grow=True, capacity="none")
    driver.watch = replace(driver.watch, warn_at=float("inf"))
    assert not driver.watch.needs_growth(started=False, lost="")
    assert not driver.watch.needs_capacity(BEGIN, started=False, lost="")
    for _ in range(10):
        driver.now += NODES_EVERY_S
        driver.watch, decisions = driver.watch.step(Facts(now=driver.now, nodes=asked_for))
        assert decisions == ()


# lost nodes


@pytest.mark.parametrize("started", [True, False])
def test_a_lost_node_of_the_workers_ends_the_fit(driver, started):
    assert driver.look(NodeFacts(started=started, lost="workers")) == (Decision.END_FOR_LOST_NODES,)


def test_a_late_start_is_reported_before_its_node_is_lost(driver):
    lost = NodeFacts(started=False, lost="workers")
    decisions = driver.look(lost, after_s=START_TIMEOUT_S + 1)
    assert decisions == (Decision.WARN_NOT_STARTED, Decision.END_FOR_LOST_NODES)


def test_a_lost_node_of_the_feed_saves_once_and_ends_the_fit_if_that_takes_too_long(driver):
    lost = NodeFacts(started=True, lost="feed", could_grow=True, capacity="none")
    found = driver.looks(lost, seconds=2 + STARVED_TIMEOUT_S + 2)
    assert found == {2.0: SAVE_FOR_FEED, 2.0 + STARVED_TIMEOUT_S + 2.0: (Decision.END_FOR_LOST_NODES,)}
    assert STARVED_TIMEOUT_S == 300.0


def test_a_node_of_the_workers_that_is_lost_during_a_save_ends_the_fit(driver):
    assert driver.look(NodeFacts(started=True, lost="feed")) == SAVE_FOR_FEED
    assert driver.look(NodeFacts(started=True, lost="workers")) == (Decision.END_FOR_LOST_NODES,)


def test_a_feed_that_has_its_nodes_again_still_stops_within_its_time(driver):
    assert driver.look(NodeFacts(started=True, lost="feed")) == SAVE_FOR_FEED
    back = NodeFacts(started=True, could_grow=True, capacity="ready")
    assert driver.looks(back, seconds=STARVED_TIMEOUT_S) == {}
    assert driver.look(back) == (Decision.END_FOR_LOST_NODES,)


def test_a_feed_that_is_lost_during_a_save_to_grow_sets_a_limit_to_it(driver):
    driver.looks(NodeFacts(started=True, could_grow=True), seconds=8)
    assert driver.watch.stopping
    assert driver.looks(WORKING, seconds=2 * STARVED_TIMEOUT_S) == {}  # a save to grow has no limit
    assert driver.look(NodeFacts(started=True, lost="feed")) == SAVE_FOR_FEED
    assert list(driver.looks(WORKING, seconds=STARVED_TIMEOUT_S + 2)) == [STARVED_TIMEOUT_S + 2]


# growth


def test_room_that_lasts_makes_a_run_grow_once(driver):
    found = driver.looks(NodeFacts(started=True, could_grow=True), seconds=1000)
    assert found == {8.0: SAVE_TO_GROW}  # seen after 2, 4 and 6 s; the look after 8 s is the first 5 s later
    assert SETTLED_S == 5.0


def test_room_that_comes_and_goes_does_not_make_a_run_grow(driver):
    room = NodeFacts(started=True, could_grow=True)
    for _ in range(20):
        assert driver.looks(room, seconds=6) == {}  # seen for 4 s
        assert driver.look(WORKING) == ()
    assert driver.looks(room, seconds=8) == {8.0: SAVE_TO_GROW}


def test_a_look_that_is_late_counts_the_time_and_not_the_looks(driver):
    room = NodeFacts(started=True, could_grow=True)
    assert driver.look(room) == ()
    assert driver.look(room, after_s=SETTLED_S) == SAVE_TO_GROW


@pytest.mark.parametrize("lost", ["feed", "workers"])
def test_room_is_not_asked_about_where_nodes_were_lost(driver, lost):
    """A plan for what is left may be impossible."""
    assert driver.watch.needs_growth(started=True, lost="")
    assert driver.watch.needs_capacity(BEGIN, started=True, lost="")
    assert not driver.watch.needs_growth(started=True, lost=lost)
    assert not driver.watch.needs_capacity(BEGIN, started=True, lost=lost)


# capacity


def test_a_run_that_cannot_request_capacity_does_not_ask_again(driver):
    assert driver.look(WORKING) == ()
    assert driver.watch.request_at == float("inf")
    assert driver.looks(NodeFacts(started=True, capacity="none"), seconds=1000) == {}


def test_capacity_is_requested_once_and_released_when_it_is_ready(driver):
    assert driver.look(NodeFacts(started=True, capacity="none")) == (Decision.REQUEST_CAPACITY,)
    assert driver.looks(NodeFacts(started=True, capacity="pending"), seconds=1000) == {}
    assert driver.look(NodeFacts(started=True, capacity="ready")) == (Decision.RELEASE_CAPACITY,)


def test_released_capacity_is_requested_again_if_the_run_has_not_grown_by_then(driver):
    assert driver.look(NodeFacts(started=True, capacity="ready")) == (Decision.RELEASE_CAPACITY,)
    found = driver.looks(NodeFacts(started=True, capacity="none"), seconds=REQUEST_EVERY_S)
    assert found == {REQUEST_EVERY_S: (Decision.REQUEST_CAPACITY,)}
    assert REQUEST_EVERY_S == 30.0


def test_a_run_grows_into_the_capacity_that_it_released(driver):
    assert driver.look(NodeFacts(started=True, capacity="none")) == (Decision.REQUEST_CAPACITY,)
    assert driver.look(NodeFacts(started=True, capacity="ready")) == (Decision.RELEASE_CAPACITY,)
    found = driver.looks(NodeFacts(started=True, could_grow=True, capacity="none"), seconds=20)
    assert found == {8.0: SAVE_TO_GROW}


def test_a_run_that_is_stopping_neither_grows_nor_requests_capacity(driver):
    driver.looks(NodeFacts(started=True, could_grow=True), seconds=8)
    eager = NodeFacts(started=True, could_grow=True, capacity="none")
    for _ in range(200):
        driver.now += NODES_EVERY_S
        driver.watch, decisions = driver.watch.step(Facts(now=driver.now, nodes=eager))
        assert decisions == ()


# all of it at once


@pytest.mark.parametrize("seed", range(200))
def test_whatever_a_cluster_does_no_decision_contradicts_another(seed):
    """Random histories: what must hold in each of them."""
    draw, driver = random.Random(seed), Driver()
    started, saves, feed_lost_at, warned = False, 0, None, 0
    for _ in range(400):
        started = started or draw.random() < 0.05
        nodes = NodeFacts(
            started=started,
            lost=draw.choices(["", "feed", "workers"], [300, started, 0.5])[0],
            could_grow=draw.random() < 0.7,
            capacity=draw.choice(["unavailable", "none", "pending", "ready"]),
        )
        decisions = driver.look(nodes, after_s=draw.choice([2.0, 2.5, 30.0]))
        assert len(set(decisions)) == len(decisions)
        warned += Decision.WARN_NOT_STARTED in decisions
        if Decision.SAVE_TO_GROW in decisions:
            assert started, "a fit that has not started has nothing to save"
            assert not nodes.lost
            assert saves == 0, "it is asked once"
        if Decision.SAVE_FOR_LOST_FEED in decisions:
            assert nodes.lost == "feed"
            assert feed_lost_at is None
            feed_lost_at = driver.now
        saves += bool({Decision.SAVE_TO_GROW, Decision.SAVE_FOR_LOST_FEED} & set(decisions))
        if Decision.REQUEST_CAPACITY in decisions:
            assert nodes.capacity == "none"
            assert not saves, "a stopping fit requests nothing"
        starved = feed_lost_at is not None and driver.now > feed_lost_at + STARVED_TIMEOUT_S
        assert (Decision.END_FOR_LOST_NODES in decisions) == (nodes.lost == "workers" or starved)
        if Decision.END_FOR_LOST_NODES in decisions:
            break
    assert warned <= 1
