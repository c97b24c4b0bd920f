"""The simulation of scale: closed forms that it must meet, and what its tables say of rows that are made up."""

import itertools
import json
import math
import statistics
import subprocess
import sys

import pytest
import scale
import simulation
from conftest import ROOT
from simulation import Clock, Cluster, Compute, Exchanging, FeedCost, Head, Net, Send, Server, Shared, Store, Wait

from alexnet.cost import communication, estimate
from alexnet.layouts import Layout

FREE = Exchanging()


def cores(workers, count, exchanging=FREE, crowding=1.0):
    """Workers on one node with so many cores, over whose links everything is sent at once."""
    return Cluster(workers, count, math.inf, math.inf, exchanging, crowding)


def gpus(per_node, inside=math.inf, between=math.inf, exchanging=FREE):
    return Cluster(per_node, None, inside, between, exchanging)


def step_s(cluster, layout, plan, **settings):
    return simulation.simulate_steps(cluster, layout, tuple(plan), steps=6, **settings).step_s


# --- what is shared ---


def test_users_of_a_shared_thing_get_equal_parts_of_it():
    clock, ends = Clock(), []
    link = Shared(clock, lambda users: 100 / users)

    def send(after, amount):
        yield clock.after(after)
        yield link.use(amount)
        ends.append((amount, clock.now))

    for after, amount in ((0.0, 100), (0.5, 25), (0.5, 300)):
        clock.start(send(after, amount))
    clock.run()
    # alone for half a second: 50. Three have a third each until 25 are sent, at 1.25; then two, until the first has
    # its 100 at 1.75; then the last has 250 to go
    assert ends == [(25, pytest.approx(1.25)), (100, pytest.approx(1.75)), (300, pytest.approx(4.25))]


def test_a_server_serves_one_after_another():
    clock, ends = Clock(), []
    server = Server(clock)

    def ask():
        yield server.serve(2.0)
        ends.append(clock.now)

    for _ in range(3):
        clock.start(ask())
    clock.run()
    assert ends == [2.0, 4.0, 6.0]
    assert server.busy_s == 6.0


def test_who_puts_waits_for_room_and_who_takes_for_something():
    clock, store, seen = Clock(), Store(1), []

    def put():
        for number in range(3):
            yield store.put()
            seen.append(("put", number, clock.now))

    def take():
        for number in range(3):
            yield clock.after(1.0)
            yield store.take()
            seen.append(("taken", number, clock.now))

    clock.start(put())
    clock.run(clock.start(take()))
    assert [each for each in seen if each[0] == "put"] == [("put", 0, 0.0), ("put", 1, 1.0), ("put", 2, 2.0)]


# --- steps ---


def test_one_worker_takes_the_sum_of_its_parts():
    plan = simulation.step_plan(Net(), Layout("single", 1), 128, 50e12, 1e12)
    flops = estimate(num_classes=1000, input_size=224, width=1.0, global_batch_size=128)
    first = next(op.seconds for op in plan if isinstance(op, Compute) and op.name == "conv1 forward")
    update = simulation.UPDATE_PASSES * 4 * flops.num_parameters / 1e12
    # alexnet.cost counts three passes of every layer; of the first, a step makes two
    assert simulation.seconds_alone(plan) == pytest.approx(128 * flops.training_flops / 50e12 - first + update)
    assert step_s(gpus(8), Layout("single", 1), plan) == pytest.approx(simulation.seconds_alone(plan))


@pytest.mark.parametrize("kind", ["data", "columns", "hybrid"])
@pytest.mark.parametrize("workers", [2, 8, 64])
def test_a_step_sends_the_bytes_of_the_ledger_and_computes_an_equal_part(kind, workers):
    layout = Layout(kind, workers)
    plan = simulation.step_plan(Net(), layout, 16, 1e12, math.inf)
    ledger = communication(layout, num_classes=1000, input_size=224, width=1.0, global_batch_size=16 * workers)
    assert simulation.bytes_sent(plan) == pytest.approx(sum(each.size_bytes for each in ledger))
    alone = simulation.step_plan(Net(), Layout("single", 1), 16, 1e12, math.inf)
    assert simulation.seconds_alone(plan) == pytest.approx(simulation.seconds_alone(alone))


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_a_ring_sends_twice_all_but_a_share(workers):
    size, rate = 1e9, 1e8
    sent = 2 * (workers - 1) / workers * size
    layout = Layout("data", workers)
    plan = [Send("all_reduce", sent, "replica")]
    assert step_s(gpus(1, between=rate), layout, plan) == pytest.approx(sent / rate)
    assert step_s(gpus(workers, inside=rate), layout, plan) == pytest.approx(sent / rate)
    late = Exchanging(round_s=0.25)
    assert step_s(gpus(workers, exchanging=late), layout, plan) == pytest.approx(2 * (workers - 1) * 0.25)


def test_a_tree_is_taken_where_it_has_fewer_messages():
    plan = [Send("all_reduce", 1.0, "replica")]
    tree = Exchanging(round_s=1.0, tree=True)
    assert step_s(gpus(1, exchanging=tree), Layout("data", 2), plan) == pytest.approx(2)
    assert step_s(gpus(1, exchanging=tree), Layout("data", 64), plan) == pytest.approx(12)


def test_a_ring_leaves_a_node_once_and_messages_to_all_leave_it_from_every_worker():
    layout, rate = Layout("hybrid", 8), 100.0
    ring = step_s(gpus(4, between=rate), layout, [Send("all_gather", 700.0, "member")])
    assert ring == pytest.approx(7.0)
    direct = step_s(gpus(4, between=rate), layout, [Send("all_to_all", 700.0, "member")])
    assert direct == pytest.approx(4 * 700 * 4 / 7 / rate)


def test_an_exchange_that_overlaps_is_hidden_by_the_arithmetic_after_it():
    layout = Layout("data", 2)

    def takes(sent):
        plan = [Compute(1.0), Send("all_reduce", sent, "replica", overlaps=True), Compute(2.0), Wait(), Compute(0.5)]
        return step_s(gpus(1, between=1.0), layout, plan)

    assert takes(1.5) == pytest.approx(3.5)
    assert takes(3.0) == pytest.approx(4.5)


def test_two_exchanges_of_a_worker_run_one_after_another():
    plan = [Send("all_reduce", 1.0, "replica", overlaps=True)] * 2 + [Wait()]
    late = Exchanging(round_s=0.5)
    assert step_s(gpus(2, exchanging=late), Layout("data", 2), plan) == pytest.approx(2.0)


@pytest.mark.parametrize(("workers", "times"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_processes_share_the_cores(workers, times):
    layout = Layout("data", workers)
    assert step_s(cores(workers, 2), layout, [Compute(1.0), Compute(0.5)]) == pytest.approx(1.5 * times)


def test_cores_that_are_all_busy_are_slower():
    assert step_s(cores(1, 2, crowding=1.2), Layout("data", 1), [Compute(1.0)]) == pytest.approx(1.0)
    assert step_s(cores(2, 2, crowding=1.2), Layout("data", 2), [Compute(1.0)]) == pytest.approx(1.2)
    assert step_s(cores(8, 2, crowding=1.2), Layout("data", 8), [Compute(1.0)]) == pytest.approx(4.8)


def test_exchanges_take_the_cores_of_those_that_make_them():
    work = Exchanging(0.5, {"all_reduce": 0.02}, 0.25, {"all_reduce": 0.01})
    plan = [Send("all_reduce", 100.0, "replica")]
    assert step_s(cores(2, 2, work), Layout("data", 2), plan) == pytest.approx(2 * 0.5 + 2.0)  # by the clock
    assert step_s(cores(8, 2, work), Layout("data", 8), plan) == pytest.approx(4 * (14 * 0.25 + 1.0))  # by the cores


def test_all_wait_for_the_slowest():
    plan = [Compute(1.0), Send("all_reduce", 0.0, "replica")]
    rows = [simulation.simulate_steps(gpus(8), Layout("data", w), tuple(plan), steps=400, delays=[1.0, 2.0])
            for w in (1, 4)]  # fmt: skip
    # of four workers none is slow in one step of sixteen
    assert [row.step_s for row in rows] == [pytest.approx(1.5, abs=0.1), pytest.approx(2 - 1 / 16, abs=0.04)]
    assert rows[1].exchange_s == pytest.approx(2 - 1 / 16 - 1.5, abs=0.1)


def test_a_seed_gives_the_same_steps_and_another_one_others():
    plan, layout = [Compute(1.0), Send("all_reduce", 1.0, "replica")], Layout("data", 4)
    one, again, other = (
        simulation.simulate_steps(gpus(2, 1.0, 1.0), layout, tuple(plan), steps=9, delays=[1.0, 1.3, 2.0], seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize("kind", ["data", "columns", "hybrid"])
def test_faster_links_never_make_a_step_longer(kind):
    plan = simulation.step_plan(Net(), Layout(kind, 16), 128, 10e12, 1e12)
    found = [step_s(gpus(8, 10 * rate, rate), Layout(kind, 16), plan) for rate in (1e8, 1e9, 1e10, 1e11, 1e12)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[-1]


def feed(decode_s=0.0, asked=0.0, size=0.0):
    return FeedCost(decode_s, asked, size, requests_per_s=100.0, node_bytes_per_s=1000.0)


@pytest.mark.parametrize(
    ("cost", "takes"),
    [
        (feed(decode_s=0.5), 1.0),  # hidden behind the step
        (feed(decode_s=3.0), 3.0),
        (feed(asked=150.0), 4 * 1.5),  # of storage that serves all four
        (feed(size=1500.0), 2 * 1.5),  # over the link of two workers of a node
    ],
)
def test_a_step_takes_as_long_as_the_slowest_part_of_its_feed(cost, takes):
    steps = simulation.simulate_steps(gpus(2), Layout("data", 4), (Compute(1.0),), steps=30, feed=cost)
    assert steps.step_s == pytest.approx(takes, rel=0.02)
    assert steps.feed_s == pytest.approx(takes - 1.0, abs=0.1)


# --- epochs and runs ---


def test_a_report_waits_for_the_next_poll():
    fast = simulation.simulate_epoch(Head(0.0, 2.0, 0.0), 8, 10.3, 0.0, 0.0, epochs=50)
    assert fast.report_s == pytest.approx(1.7, abs=0.05), "polls are two seconds apart, and epochs begin with one"
    assert fast.whole_s == pytest.approx(10.3 + fast.report_s)
    # a poll of all takes 10 seconds, and the next begins 2 later: one is under way when the reports of 2 seconds arrive
    slow = simulation.simulate_epoch(Head(0.01, 2.0, 0.002), 1000, 10.3, 0.0, 0.0, epochs=50)
    assert (10.3 + slow.report_s) == pytest.approx(24.0, abs=0.3)


def test_without_failures_nothing_is_lost():
    run = simulation.simulate_run(100.0, 90, 64, math.inf, 300.0)
    assert (run.whole_s, run.failures, run.lost_s) == (9000.0, 0, 0.0)


def test_what_failures_cost_is_the_mean_that_probability_gives():
    settings = {"epoch_s": 600.0, "epochs": 90, "nodes": 64, "mtbf_s": 64 * 3600.0, "restart_s": 120.0}
    runs = [simulation.simulate_run(**settings, seed=seed) for seed in range(300)]
    expected = simulation.expected_run_s(**settings)
    rate = 1 / 3600
    assert expected == pytest.approx(90 * (math.exp(rate * 600) - 1) * (3600 + 120))
    assert statistics.mean(run.whole_s for run in runs) == pytest.approx(expected, rel=0.01)
    assert all(run.whole_s == pytest.approx(90 * 600 + run.lost_s) for run in runs)
    assert simulation.simulate_run(**settings, seed=3) == runs[3]


# --- the tables ---


def test_a_worker_of_many_reads_a_row_group_for_few_images():
    def in_a_window(images):
        """The share of row groups that so many images of a window of 32 are expected to lie in, for each of them."""
        return 32 * (1 - (31 / 32) ** images) / images

    # of 64 and 1,024 workers each has its images of a batch in one window, and in each batch another
    assert scale.row_groups_per_image(64, 128) == pytest.approx(in_a_window(128), rel=0.05)
    assert scale.row_groups_per_image(1024, 32) == pytest.approx(in_a_window(32), rel=0.1)
    # one worker's task of 384 images is within a window or two; in batches that are sorted it would not matter
    assert 32 / 384 <= scale.row_groups_per_image(1, 128) <= 64 / 384
    assert scale.row_groups_per_image(1024, 32, by_group=True) <= 2 / 32


def row(layout, workers, images_per_s, efficiency=1.0, use=None):
    return scale.Row(layout, workers, 128, 1.0, images_per_s, efficiency, "compute", images_per_s, "compute", use or {})


def test_a_layout_stops_paying_where_it_is_inefficient_or_another_is_faster():
    rows = [
        row("data", 2, 190, 0.95), row("hybrid", 2, 195, 0.97), row("columns", 2, 100, 0.5),
        row("data", 4, 380, 0.95), row("hybrid", 4, 180, 0.45), row("columns", 4, 150, 0.37),
    ]  # fmt: skip
    assert scale.stops_paying(rows) == [
        ("data", None, 2, "hybrid"), ("columns", 4, 2, "hybrid"), ("hybrid", 4, 4, "data"),
    ]  # fmt: skip


def test_what_breaks_first_comes_first():
    rows = [row("data", workers, workers, use={"head": workers / 100, "storage": workers / 10, "other": 0.1})
            for workers in (1, 8, 64, 512)]  # fmt: skip
    assert scale.breaks(rows) == [("storage", 64, 51.2), ("head", 512, 5.12), ("other", None, 0.1)]


def test_machines_have_a_source_or_an_assumption_for_every_figure():
    nodes, everywhere = scale.machines()
    assert nodes["g4dn"].usd_per_hour == 3.912, "from cluster.yaml"
    for name, machine in [*nodes.items(), ("all", everywhere)]:
        told = " ".join(itertools.chain(machine.stated, machine.assumed))
        figures = {name for name, field in machine if isinstance(field, int | float)}
        assert [figure for figure in figures if figure not in told] == [], name


def test_a_plan_is_the_same_after_a_file():
    plan = (Compute(0.5, "a"), Send("all_reduce", 3.0, "replica", True), Wait())
    assert scale.plan_from_json(json.loads(json.dumps(scale.plan_to_json(plan)))) == plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--most-workers", "0"], "--most-workers = 0: expected 1 to 1024"),
        (["--machine", "abacus"], "--machine = abacus: unknown; choose of g4dn, p4d, p5, this"),
        (
            ["--json", "nowhere.json"],
            "--json = nowhere.json: no such file; --measure writes it",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(flags, says):
    command = [sys.executable, "benchmarks/scale.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, says + "\n")
