"""A training run of many workers as a discrete-event simulation: steps, epochs with their checkpoints, and failures.

Nothing here measures, reads a clock or asks Ray: a simulation is a function of its settings and of a seed. `scale.py`
has the settings: parts that were measured, and machines whose figures others publish. FLOPs and bytes are those of
alexnet/cost.py, CPUs are shared as orchestrator/cluster/placement.py shares them.

Processes are generators that yield the events they wait for. W workers, B images of a worker in a step.
"""

import functools
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from alexnet.cost import communication, layers_of
from alexnet.layouts import Layout
from alexnet.partition import Partition
from alexnet.presets import preset_of
from orchestrator.cluster.layout_choice import UPDATE_PASSES

BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # of DistributedDataParallel's gradients, its defaults
BYTES = 4  # of a number in float32
AHEAD = 2  # batches that a worker's reader and its decoder may each be ahead
WARM_STEPS = 4  # at the beginning of a simulation, which do not count: queues fill

Process = Generator["Event", None, None]


# --- the clock, and what is shared ---


class Event:
    """Something that happens once."""

    def __init__(self) -> None:
        self.happened = False
        self._then: list[Callable[[], None]] = []

    def then(self, call: Callable[[], None]) -> None:
        """Call it when this happens, or now if it has."""
        if self.happened:
            call()
        else:
            self._then.append(call)

    def happen(self) -> None:
        assert not self.happened, "an event happens once"
        self.happened = True
        for call in self._then:
            call()
        self._then.clear()


class Clock:
    """Simulated seconds, and what is to happen in them; what is due at the same time happens in the order of entry."""

    def __init__(self) -> None:
        self.now, self.num_events = 0.0, 0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._numbers), call))

    def after(self, seconds: float) -> Event:
        event = Event()
        self.at(self.now + seconds, event.happen)
        return event

    def start(self, process: Process) -> Event:
        """Run a process; returns its end."""
        end = Event()

        def resume() -> None:
            for event in process:
                if not event.happened:
                    event.then(resume)
                    return
            end.happen()

        self.at(self.now, resume)
        return end

    def run(self, until: Event | None = None) -> None:
        """Until the event happens, or nothing more does."""
        while self._due and not (until and until.happened):
            self.now, _, call = heapq.heappop(self._due)
            self.num_events += 1
            call()
        assert until is None or until.happened, "processes wait for each other for ever"


class Shared:
    """A resource whose users all get the same share: cores of a node, or a link.

    speed: what each of n users gets per second.
    """

    def __init__(self, clock: Clock, speed: Callable[[int], float]) -> None:
        self.clock, self.speed = clock, speed
        self.busy_s = 0.0  # with any user
        self._given, self._at, self._round = 0.0, 0.0, 0  # to each user so far; when that was; changes of users
        self._users: list[tuple[float, int, Event]] = []  # until how much is given
        self._numbers = itertools.count()

    def use(self, amount: float) -> Event:
        """The event of having got so much: core-seconds, bytes."""
        event = Event()
        self._settle()
        heapq.heappush(self._users, (self._given + amount, next(self._numbers), event))
        self._plan()
        return event

    def _settle(self) -> None:
        passed = self.clock.now - self._at
        if self._users and passed:
            self._given += passed * self.speed(len(self._users))
            self.busy_s += passed
        self._at = self.clock.now

    def _plan(self) -> None:
        self._round += 1
        if self._users:
            left = max(0.0, self._users[0][0] - self._given)
            this = self._round
            self.clock.at(self.clock.now + left / self.speed(len(self._users)), lambda: self._finish(this))

    def _finish(self, planned: int) -> None:
        if planned != self._round:
            return  # the users have changed since
        self._settle()
        self._given = max(self._given, self._users[0][0])
        done = []
        while self._users and self._users[0][0] <= self._given * (1 + 1e-12):
            done.append(heapq.heappop(self._users)[2])
        self._plan()
        for event in done:
            event.happen()


class Server:
    """Serves one request after another: the head, storage that allows so many requests a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.busy_s, self._free_at = clock, 0.0, 0.0

    def serve(self, seconds: float) -> Event:
        self._free_at = max(self._free_at, self.clock.now) + seconds
        self.busy_s += seconds
        return self.clock.after(self._free_at - self.clock.now)


class Store:
    """A queue between two processes with room for a few things."""

    def __init__(self, room: int) -> None:
        self._room, self._count = room, 0
        self._putting, self._taking = deque[Event](), deque[Event]()

    def put(self) -> Event:
        event = Event()
        self._putting.append(event)
        self._match()
        return event

    def take(self) -> Event:
        event = Event()
        self._taking.append(event)
        self._match()
        return event

    def _match(self) -> None:
        while (self._putting and self._count < self._room) or (self._taking and self._count):
            if self._putting and self._count < self._room:
                self._count += 1
                self._putting.popleft().happen()
            if self._taking and self._count:
                self._count -= 1
                self._taking.popleft().happen()


# --- what a worker does in a step ---


@dataclass(frozen=True)
class Compute:
    """Arithmetic of one worker."""

    seconds: float
    name: str = ""


@dataclass(frozen=True)
class Send:
    """An exchange that all workers of a group make together."""

    kind: str  # all_reduce, all_gather or all_to_all
    size_bytes: float  # that a worker sends
    among: str  # member: the workers that hold one net; replica: those that hold the same part; all
    overlaps: bool = False  # with the arithmetic after it


@dataclass(frozen=True)
class Wait:
    """For this worker's exchanges that overlap."""


Plan = tuple[Compute | Send | Wait, ...]


@dataclass(frozen=True)
class Net:
    """What is trained."""

    num_classes: int = 1000
    input_size: int = 224
    width: float = 1.0
    preset: str = "paper"

    def sizes(self) -> dict[str, Any]:
        """As arguments of alexnet/cost.py."""
        return {
            "num_classes": self.num_classes, "input_size": self.input_size, "width": self.width, "preset": self.preset,
        }  # fmt: skip


def among(kind: str, name: str) -> str:
    """Which workers make an exchange of alexnet.cost.communication together."""
    return "replica" if name == "gradients" and kind != "hybrid" else "member"


def step_plan(net: Net, layout: Layout, worker_images: int, flops_per_s: float, memory_bytes_per_s: float) -> Plan:
    """A worker's step from the shapes: layers forward, layers backward, the update.

    Every layer computes at the same rate. Exchanges are made where alexnet/layouts.py makes them, and gradients in
    buckets as soon as all of a bucket's are there, as DistributedDataParallel does; the update is bound by memory.
    """
    layers = [layer for layer in layers_of(**net.sizes()) if layer.multiply_adds]
    exchanges = communication(layout, **net.sizes(), global_batch_size=worker_images * layout.workers)
    at = {exchange.layer: exchange for exchange in exchanges if exchange.layer and exchange.name[:6] != "scores"}
    partition = Partition(preset_of(net.preset), layout)
    found: list[Compute | Send | Wait] = []
    for layer in layers:
        if layer.name in at:
            found.append(Send("all_gather", at[layer.name].forward_bytes, "member"))
        found.append(Compute(2 * layer.multiply_adds * worker_images / flops_per_s, f"{layer.name} forward"))
    found += [Send("all_reduce", each.forward_bytes, "member") for each in exchanges if each.name[:6] == "scores"]
    gradients = next((each for each in exchanges if each.overlaps), None)
    summed, waiting, limit, held = 0.0, 0.0, float(FIRST_BUCKET_BYTES), 0.0
    for number, layer in reversed(list(enumerate(layers))):
        passes = 2 if number else 1  # nothing is upstream of the first layer that would need a gradient
        seconds = passes * 2 * layer.multiply_adds * worker_images / flops_per_s
        found.append(Compute(seconds, f"{layer.name} backward"))
        if layer.name in at and at[layer.name].backward_bytes:
            found.append(Send("all_to_all", at[layer.name].backward_bytes, "member"))
        part = layer.parameters / (layout.group_size if layer.name in partition.sharded else 1)
        held += part
        if gradients is not None and (layout.kind != "hybrid" or layer.kind == "conv"):
            waiting += BYTES * part
            summed += BYTES * part
            if waiting >= limit:
                found.append(Send("all_reduce", waiting, among(layout.kind, "gradients"), overlaps=True))
                waiting, limit = 0.0, float(BUCKET_BYTES)
    if waiting:
        found.append(Send("all_reduce", waiting, among(layout.kind, "gradients"), overlaps=True))
    if gradients is not None:  # from the buckets' sizes to the bytes that the ledger says are sent for them
        scale = gradients.backward_bytes / summed
        found = [
            replace(o, size_bytes=o.size_bytes * scale) if isinstance(o, Send) and o.overlaps else o for o in found
        ]
    found += [Wait(), Compute(UPDATE_PASSES * BYTES * held / memory_bytes_per_s, "update")]
    return tuple(found)


def seconds_alone(plan: Plan) -> float:
    """Of a step's arithmetic, without exchanges."""
    return sum(op.seconds for op in plan if isinstance(op, Compute))


def bytes_sent(plan: Plan) -> float:
    return sum(op.size_bytes for op in plan if isinstance(op, Send))


# --- the machines ---


@dataclass(frozen=True)
class Exchanging:
    """What an exchange costs a worker beside the bytes on a link."""

    round_s: float = 0.0  # each message that waits for the one before it, with nothing else to do
    s_per_byte: dict[str, float] = field(default_factory=dict)  # by kind of exchange, likewise
    round_cpu_s: float = 0.0  # of a core, for each such message
    cpu_s_per_byte: dict[str, float] = field(default_factory=dict)  # of a core, by kind of exchange
    tree: bool = False  # whether the library takes a tree for sums where that is faster, as NCCL does


@dataclass(frozen=True)
class Cluster:
    """Equal nodes, on each of which consecutive workers are. Rates are bytes per second."""

    workers_per_node: int
    cores: int | None  # of a node, which its workers share; None: each worker computes on a GPU of its own
    inside: float  # a worker's own link to the others of its node; infinite where that is work for the cores
    between: float  # a node's link to others, one direction, which its workers share
    exchanging: Exchanging
    crowding: float = 1.0  # how many times longer arithmetic takes when all cores are busy

    def core_speed(self, users: int) -> float:
        """The share of a core that each of so many busy threads of a node gets."""
        assert self.cores is not None
        slower = 1 + (self.crowding - 1) * (min(users, self.cores) - 1) / max(1, self.cores - 1)
        return min(1.0, self.cores / users) / slower


@dataclass(frozen=True)
class FeedCost:
    """What a worker's batch costs before it is there."""

    decode_s: float  # with the CPUs of one worker's tasks; of cores that the workers compute on, of one
    requests: float  # to storage
    storage_bytes: float  # read from it
    requests_per_s: float  # that storage allows, of all workers together
    node_bytes_per_s: float  # between a node and storage


def rounds(kind: str, members: int) -> int:
    """Messages of an exchange that wait for one another, in a ring."""
    return 2 * (members - 1) if kind == "all_reduce" else members - 1


# --- steps ---


@dataclass(frozen=True)
class Steps:
    """What simulated steps took: seconds, means of a step."""

    step_s: float
    compute_s: float  # of a worker, arithmetic, sharing cores with others
    exchange_s: float  # of a worker, waiting for exchanges and for slower workers
    feed_s: float  # of a worker, waiting for images
    num_events: int


class _Simulation:
    """W workers that make steps together."""

    def __init__(
        self, cluster: Cluster, layout: Layout, plan: Plan, steps: int, delays: Sequence[float], seed: int,
        feed: FeedCost | None,
    ) -> None:  # fmt: skip
        self.clock, self.cluster, self.layout, self.plan, self.steps, self.feed = (
            Clock(), cluster, layout, plan, steps, feed,
        )  # fmt: skip
        num_nodes = -(-layout.workers // cluster.workers_per_node)
        self.cores = [Shared(self.clock, cluster.core_speed) for _ in range(num_nodes if cluster.cores else 0)]
        self.between = [Shared(self.clock, lambda users: cluster.between / users) for _ in range(num_nodes)]
        rate = feed.node_bytes_per_s if feed else math.inf
        self.from_storage = [Shared(self.clock, lambda users: rate / users) for _ in range(num_nodes)]
        self.storage = Server(self.clock)
        self.delays = np.random.default_rng(seed).choice(np.asarray(delays, float), (layout.workers, steps))
        self.groups = {name: self._groups(name) for name in ("member", "replica", "all")}
        self.meetings: dict[tuple[str, int, int], list[Event]] = {}
        self.spent = {"compute": 0.0, "exchange": 0.0, "feed": 0.0}
        self.ended: list[float] = [0.0] * steps  # when the last worker ended a step

    def _groups(self, among: str) -> list[range]:
        """The ranks with which each rank exchanges."""
        layout = self.layout
        if among == "all":
            return [range(layout.workers)] * layout.workers
        if among == "member":
            return [layout.group_of(rank) for rank in range(layout.workers)]
        return [range(rank % layout.group_size, layout.workers, layout.group_size) for rank in range(layout.workers)]

    def run(self) -> Steps:
        if self.feed is not None:
            self.stores = [(Store(AHEAD), Store(AHEAD)) for _ in range(self.layout.workers)]
            for rank in range(self.layout.workers):
                self.clock.start(self._read(rank, self.feed))
                self.clock.start(self._decode(rank, self.feed))
        left = [self.clock.start(self._work(rank)) for rank in range(self.layout.workers)]
        self.clock.run(all_of(left))
        first = min(WARM_STEPS, self.steps - 1)
        began = self.ended[first - 1] if first else 0.0
        counted = (self.steps - first) * self.layout.workers
        return Steps(
            (self.ended[-1] - began) / (self.steps - first),
            self.spent["compute"] / counted, self.spent["exchange"] / counted, self.spent["feed"] / counted,
            self.clock.num_events,
        )  # fmt: skip

    def node_of(self, rank: int) -> int:
        return rank // self.cluster.workers_per_node

    def _read(self, rank: int, feed: FeedCost) -> Process:
        for _ in range(self.steps):
            yield self.storage.serve(feed.requests / feed.requests_per_s)
            yield self.from_storage[self.node_of(rank)].use(feed.storage_bytes)
            yield self.stores[rank][0].put()

    def _decode(self, rank: int, feed: FeedCost) -> Process:
        for _ in range(self.steps):
            yield self.stores[rank][0].take()
            shared = self.cores[self.node_of(rank)] if self.cores else None
            yield shared.use(feed.decode_s) if shared else self.clock.after(feed.decode_s)
            yield self.stores[rank][1].put()

    def _work(self, rank: int) -> Process:
        number = itertools.count()  # of this worker's exchanges
        pending: list[Event] = []
        for step in range(self.steps):
            counts = step >= min(WARM_STEPS, self.steps - 1)

            def spend(what: str, since: float, counts: bool = counts) -> None:
                self.spent[what] += (self.clock.now - since) * counts

            if self.feed is not None:
                begun = self.clock.now
                yield self.stores[rank][1].take()
                spend("feed", begun)
            for op in self.plan:
                begun = self.clock.now
                if isinstance(op, Compute):
                    seconds = op.seconds * self.delays[rank, step]
                    if self.cores:
                        yield self.cores[self.node_of(rank)].use(seconds)
                    else:
                        yield self.clock.after(seconds)
                    spend("compute", begun)
                elif isinstance(op, Send):
                    # exchanges of a worker run one after another, in the order in which they were asked for
                    before = pending[-1] if pending else None
                    done = Event()
                    arrive = functools.partial(self._arrive, rank, op, next(number), done)
                    if before is None:
                        arrive()
                    else:
                        before.then(arrive)
                    pending.append(done)
                    if not op.overlaps:
                        yield done
                        pending.clear()
                        spend("exchange", begun)
                else:
                    yield all_of(pending)
                    pending.clear()
                    spend("exchange", begun)
            self.ended[step] = max(self.ended[step], self.clock.now)

    def _arrive(self, rank: int, op: Send, number: int, done: Event) -> None:
        """A worker is there for an exchange, which begins when all of its group are."""
        group = self.groups[op.among][rank]
        if len(group) == 1:
            done.happen()
            return
        waiting = self.meetings.setdefault((op.among, group.start, number), [])
        waiting.append(done)
        if len(waiting) == len(group):
            del self.meetings[op.among, group.start, number]
            self.clock.start(self._exchange(op, group, waiting))

    def _exchange(self, op: Send, group: range, waiting: list[Event]) -> Process:
        """An exchange of a group, which ends for all at the same time."""
        cluster, members, waits, work = self.cluster, len(group), self._rounds(op, group), self.cluster.exchanging
        alone = self.clock.after(waits * work.round_s + op.size_bytes * work.s_per_byte.get(op.kind, 0.0))
        parts = [alone]
        if self.cores:  # where others compute, too: as long as its share of the cores takes, if that is longer
            cpu_s = waits * work.round_cpu_s + op.size_bytes * work.cpu_s_per_byte.get(op.kind, 0.0)
            parts += [self.cores[self.node_of(rank)].use(cpu_s) for rank in group]
        else:
            yield alone
        nodes = Counter(self.node_of(rank) for rank in group)
        if math.isfinite(cluster.inside) and max(nodes.values()) > 1:
            parts.append(self.clock.after(op.size_bytes / cluster.inside))
        if len(nodes) > 1:
            for node, local in nodes.items():  # a ring leaves a node once, what each sends to each from all of them
                share = local * (members - local) / (members - 1) if op.kind == "all_to_all" else 1.0
                parts.append(self.between[node].use(op.size_bytes * share))
        yield all_of(parts)
        for event in waiting:
            event.happen()

    def _rounds(self, op: Send, group: range) -> float:
        """Messages one after another; of a tree where the library takes one and it has fewer."""
        ring = rounds(op.kind, len(group))
        if self.cluster.exchanging.tree and op.kind == "all_reduce":
            return min(ring, 2 * math.ceil(math.log2(len(group))))
        if self.cluster.exchanging.tree and op.kind == "all_to_all":
            return 1  # all messages are under way at the same time
        return ring


def all_of(events: Iterable[Event]) -> Event:
    """The event of all of them having happened."""
    left = [event for event in events if not event.happened]
    found, count = Event(), len(left)
    if not left:
        found.happen()

    def one() -> None:
        nonlocal count
        count -= 1
        if not count:
            found.happen()

    for event in left:
        event.then(one)
    return found


def simulate_steps(
    cluster: Cluster, layout: Layout, plan: Plan, *, steps: int, delays: Sequence[float] = (1.0,), seed: int = 0,
    feed: FeedCost | None = None,
) -> Steps:  # fmt: skip
    """Steps of all workers of a run. delays: times of steps as multiples of their median, of which every worker draws
    one in each step."""
    return _Simulation(cluster, layout, plan, steps, delays, seed, feed).run()


# --- epochs and runs ---


@dataclass(frozen=True)
class Head:
    """The work of the driver and the head for every worker: seconds of one thread."""

    poll_s: float  # to ask a worker how it is, which Ray Train does with all of them
    poll_every_s: float
    report_s: float  # a worker's report at the end of an epoch, at the actor through which all of them agree


@dataclass(frozen=True)
class Epoch:
    """Seconds of an epoch."""

    train_s: float
    validate_s: float
    checkpoint_s: float
    report_s: float  # from the checkpoint to the next epoch

    @property
    def whole_s(self) -> float:
        return self.train_s + self.validate_s + self.checkpoint_s + self.report_s


def simulate_epoch(head: Head, workers: int, train_s: float, validate_s: float, checkpoint_s: float, *, seed: int = 0,
                   epochs: int = 20) -> Epoch:  # fmt: skip
    """The mean of some epochs: the workers train, validate, store a checkpoint and report, which ends with the driver's
    next poll of all workers. The driver polls when it has ended the poll before and poll_every_s have passed."""
    clock, over = Clock(), False
    waiting: list[Event] = []
    reported = 0.0

    def driver() -> Process:
        yield clock.after(float(np.random.default_rng(seed).uniform(0, head.poll_every_s)))
        while not over:
            served, waiting[:] = list(waiting), []
            yield clock.after(head.poll_s * workers)
            for event in served:
                event.happen()
            yield clock.after(head.poll_every_s)

    def training() -> Process:
        nonlocal over, reported
        for _ in range(epochs):
            yield clock.after(train_s + validate_s + checkpoint_s)
            begun, polled = clock.now, Event()
            yield clock.after(head.report_s * workers)
            waiting.append(polled)
            yield polled
            reported += clock.now - begun
        over = True

    clock.start(driver())
    clock.run(clock.start(training()))
    return Epoch(train_s, validate_s, checkpoint_s, reported / epochs)


@dataclass(frozen=True)
class Run:
    """A run of many epochs: seconds, and what failures cost it."""

    whole_s: float
    failures: int
    lost_s: float  # work since the last checkpoint, and restarts


def simulate_run(epoch_s: float, epochs: int, nodes: int, mtbf_s: float, restart_s: float, *, seed: int = 0) -> Run:
    """Epochs that each end with a checkpoint. Any node's failure takes the run back to the last one, restart_s later.

    mtbf_s: mean time between failures of one node, exponentially distributed; infinite: none. While a run restarts
    nothing fails.
    """
    random = np.random.default_rng(seed)
    clock = Clock()
    failures, lost = 0, 0.0

    def run() -> Process:
        nonlocal failures, lost
        next_failure = random.exponential(mtbf_s / nodes) if math.isfinite(mtbf_s) else math.inf
        done = 0
        while done < epochs:
            begun = clock.now
            if begun + epoch_s <= next_failure:
                yield clock.after(epoch_s)
                done += 1
                continue
            yield clock.after(next_failure - begun)
            yield clock.after(restart_s)
            failures, lost = failures + 1, lost + clock.now - begun
            next_failure = clock.now + random.exponential(mtbf_s / nodes)

    clock.run(clock.start(run()))
    return Run(clock.now, failures, lost)


def expected_run_s(epoch_s: float, epochs: int, nodes: int, mtbf_s: float, restart_s: float) -> float:
    """The mean of `simulate_run` in closed form: (exp(rate * epoch) - 1) * (1 / rate + restart) for every epoch."""
    rate = nodes / mtbf_s
    return epochs * math.expm1(rate * epoch_s) * (1 / rate + restart_s) if rate else epochs * epoch_s
