"""Reading what a task of a preparation needs: images in object storage before they are decoded, and neighbours in an
archive there with one request."""

import collections
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from alexnet.images import MAX_FILE_BYTES, NotAnImage
from orchestrator.data.sources import Entry, Source, read
from orchestrator.data.sources.listing import extent, read_range

READERS = 16  # threads, each with a request
IMAGES_AHEAD, RANGES_AHEAD = 32, 4  # that are read or being read while others are decoded, whichever are more
BYTES_AHEAD = 2**26  # that are held or being read; an image of more is read alone
RANGE_BYTES = 2**23  # of an archive, that one request reads
GAP_BYTES = 2**18  # between two images that are read together: headers, labels, images of the other part
RUN = 32  # images of a shard that are neighbours in their archive


def in_runs(source: Source) -> Source:
    """A source whose images all lie in archives in object storage: in the archives' order, to be shuffled by runs of
    neighbours, of which a shard takes some from anywhere. Any other source as it is."""
    entries = [entry for found in source.splits.values() for entry in found]
    if source.runs is not None or not all(_in_remote_archive(entry) for entry in entries):
        return source
    ordered = {
        split: sorted(found, key=lambda entry: (entry.path or "", entry.start or 0, entry.id))
        for split, found in source.splits.items()
    }
    runs = {split: [min(RUN, len(found) - at) for at in range(0, len(found), RUN)] for split, found in ordered.items()}
    return replace(source, splits=ordered, runs=runs)


def read_ahead(entries: Sequence[Entry]) -> Iterator[tuple[int, Callable[[], bytes]]]:
    """Every entry's position, with a call that returns its bytes or raises as `read` does. Those of archives in object
    storage come in the order of the archive, before others."""
    if not any(map(_is_remote, entries)):
        for position, entry in enumerate(entries):
            yield position, functools.partial(read, entry)
        return
    held = _Held(BYTES_AHEAD)
    with ThreadPoolExecutor(READERS) as pool:
        waiting: collections.deque[tuple[list[int], Future[list[bytes | NotAnImage]], int]] = collections.deque()
        images = 0
        try:
            for turn, run in enumerate(together(entries)):
                some = [entries[position] for position in run]
                waiting.append((run, pool.submit(_fetched, some, held, turn), turn))
                images += len(run)
                while len(waiting) > RANGES_AHEAD and images > IMAGES_AHEAD:
                    images -= len(waiting[0][0])
                    yield from _given(*waiting.popleft(), held)
            for each in waiting:
                yield from _given(*each, held)
        finally:
            held.close()  # whoever waits for room would wait for ever
            pool.shutdown(wait=False, cancel_futures=True)


class _Held:
    """Bytes that are read or being read. Readers get room in the order of their turns, so that the one whose bytes are
    wanted next never waits for those after it."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._next = most, 0, 0
        self._sizes: dict[int, int] = {}
        self._closed = False
        self._changed = threading.Condition()

    def take(self, turn: int, size: int) -> None:
        """Wait for room for so many bytes; once in each turn. Raises CancelledError where nobody wants them now."""
        with self._changed:
            if turn in self._sizes:  # another attempt
                return
            self._changed.wait_for(
                lambda: self._closed or (self._next == turn and (not self._held or self._held + size <= self._most))
            )
            if self._closed:
                raise concurrent.futures.CancelledError
            self._sizes[turn] = size
            self._held += size
            self._next = turn + 1
            self._changed.notify_all()

    def give(self, turn: int) -> None:
        """The bytes of a turn are gone."""
        with self._changed:
            self._held -= self._sizes[turn]
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def together(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of the entries, in lists that one request reads: neighbours in an archive in object storage."""
    placed, alone = [], []
    for position, entry in enumerate(entries):
        if _in_remote_archive(entry) and max(entry.length or 0, entry.packed or 0) <= MAX_FILE_BYTES:
            placed.append((entry.path or "", *extent(entry), position))
        else:
            alone.append([position])
    runs: list[list[int]] = []
    path, first, last = "", 0, 0  # the range of the last run
    for where, start, end, position in sorted(placed):
        if runs and where == path and start <= last + GAP_BYTES and max(end, last) - first <= RANGE_BYTES:
            runs[-1].append(position)
            last = max(end, last)
        else:
            runs.append([position])
            path, first, last = where, start, end
    return runs + alone


def _is_remote(entry: Entry) -> bool:
    """Whether reading it is a request of its own: rows of Parquet files are read by their row groups."""
    return entry.path is not None and "://" in entry.path and entry.row is None


def _in_remote_archive(entry: Entry) -> bool:
    return _is_remote(entry) and entry.start is not None and entry.length is not None


def _fetched(entries: list[Entry], held: _Held, turn: int) -> list[bytes | NotAnImage]:
    try:
        if len(entries) > 1:
            places = [extent(entry) for entry in entries]
            held.take(turn, max(end for _, end in places) - min(start for start, _ in places))
            return read_range(entries)
        only = entries[0]
        if only.start is not None:
            held.take(turn, max(only.length or 0, only.packed or 0))
        return [read(only, lambda size: held.take(turn, size))]
    finally:
        with contextlib.suppress(concurrent.futures.CancelledError):
            held.take(turn, 0)  # of what has failed, or is no request


def _given(
    run: list[int], future: "Future[list[bytes | NotAnImage]]", turn: int, held: _Held
) -> Iterator[tuple[int, Callable[[], bytes]]]:
    """As `read_ahead` yields them: what fails the request fails each of the run."""

    def load(index: int) -> bytes:
        found = future.result()[index]
        if isinstance(found, NotAnImage):
            raise found
        return found

    for index, position in enumerate(run):
        yield position, functools.partial(load, index)
    concurrent.futures.wait([future])
    held.give(turn)
