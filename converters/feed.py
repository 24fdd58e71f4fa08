"""Source files brought in while a conversion runs, each proved by its digest, and removed when no shard needs it.

Threads fetch in the order of the plan and wait when the budget is used up. A file of an earlier run is hashed again
before it counts as there.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event

from converters.budget import StagingPlan
from converters.checkpoint.plan import Shard
from converters.checkpoint.writer import disk_errors
from converters.hub.fetch import Fetcher, HubClient, RetryPolicy
from converters.hub.listing import ListedFile, Listing
from converters.hub.partial import final_path, publish, put_aside, remove_leftovers
from converters.hub.pool import GRACE_SECONDS, Cancelled, run_jobs, start_threads
from converters.hub.verify import check_file, held_bytes
from converters.staged import StagedReader
from converters.waiting import NOTICE_SECONDS

FETCH_THREADS = 4


@dataclass(frozen=True, slots=True)
class Staging:
    """Where a streamed source lies.

    Attributes:
        folder: holds the weights that are there, and under our state folder what is coming in.
        headers: the folder that is read as the checkpoint: headers, and the files around the weights.
        side: the files around the weights that are still holes there.
    """

    listing: Listing
    folder: Path
    headers: Path
    side: tuple[ListedFile, ...]
    base_bytes: int


class Feed:
    """Makes the source files of each output shard present before it is written, and removes them after it.

    `plan`, `identities` at any time; `begin`, then for each shard `before`, and `after` from any thread; `close`.
    `on_fetched` is called, from several threads, with the bytes that came in so far.
    """

    def __init__(self, client: HubClient, staging: Staging, reader: StagedReader, budget: int) -> None:
        self.staging = staging
        self.budget = budget
        self.fetched_bytes = 0
        self.on_fetched: Callable[[int], None] = _ignore
        self._client = client
        self._reader = reader
        self._listed = {file.path: file for file in staging.listing.files}
        self._stop = Event()
        self._threads: list[Future[None]] = []
        self._changed = Condition()
        # all below: under the condition
        self._plan = StagingPlan({}, {}, 0)
        self._todo: list[str] = []
        self._held = 0
        self._ready: set[str] = set()
        self._users: dict[str, set[str]] = {}

    @property
    def source(self) -> str:
        """What the source is called: repository and pinned commit."""
        return f"{self.staging.listing.repo}@{self.staging.listing.commit}"

    def identities(self) -> dict[str, list[int | str]]:
        """Return size and digest of every source file: a file that comes in later is held against both."""
        return {file: [self._listed[file].size, self._listed[file].digest] for file in self._reader.index.files}

    def plan(self, shards: Sequence[Shard]) -> StagingPlan:
        """Return what these output shards need.

        Raises:
            ResourceError: the budget is too small.
        """
        sizes = {path: file.size for path, file in self._listed.items()}
        plan = StagingPlan.of(shards, self._reader, sizes, self.staging.base_bytes)
        plan.check(self.budget)
        return plan

    def room(self, shards: Sequence[Shard]) -> int:
        """Return the disk space that is still to be taken for these output shards."""
        plan = self.plan(shards)
        paths = [self.staging.folder / file for file in plan.files]
        return plan.held_bytes(self.budget) - sum(path.stat().st_blocks * 512 for path in paths if path.exists())

    def begin(self, shards: Sequence[Shard]) -> None:
        """Fetch the files around the weights and start to fetch what these output shards need, in their order.

        Raises:
            ResourceError: the budget is too small. InputError, NetworkError: see `Fetcher.fetch`.
        """
        self._plan = plan = self.plan(shards)
        self._remove_others(plan.first_files(self.budget))
        self._reader.end_peeking()
        self._fetch_side()
        self._held, self._todo = plan.base_bytes, list(plan.files)
        self._users = {file: {name for name, files in plan.needs.items() if file in files} for file in plan.files}
        self._threads = start_threads(self._work, min(FETCH_THREADS, len(plan.files)))
        for thread in self._threads:
            thread.add_done_callback(self._wake)

    def is_ready(self, shard: Shard) -> bool:
        """Return whether a shard can be written without waiting."""
        with self._changed:
            return self._plan.needs[shard.file] <= self._ready

    def before(self, shard: Shard) -> None:
        """Wait until all that a shard needs is there; every shard before it must be done, or this one ready.

        Raises:
            InputError, NetworkError, ResourceError: a source file cannot be had; see `Fetcher.fetch`.
        """
        with self._changed:
            while True:
                for thread in self._threads:
                    if thread.done():
                        thread.result()
                if self._plan.needs[shard.file] <= self._ready:
                    return
                self._changed.wait(NOTICE_SECONDS)

    def after(self, shard_file: str) -> None:
        """Remove what only this output shard still needed; it is journalled and synced."""
        for file in self._plan.needs[shard_file]:
            with self._changed:
                self._users[file].discard(shard_file)
                if self._users[file]:
                    continue
                self._ready.discard(file)
                self._reader.forget(file)
                with disk_errors(self.staging.folder):
                    (self.staging.folder / file).unlink()
                self._held -= self._plan.charge(file)
                self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching; what came in stays for the next run."""
        self._stop.set()
        self._wake()
        wait(self._threads, timeout=GRACE_SECONDS)

    def _wake(self, _: "Future[None] | None" = None) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._todo and self._held + self._plan.charge(self._todo[0]) > self.budget:
                    self._check_stop()
                    self._changed.wait()
                self._check_stop()
                if not self._todo:
                    return
                file = self._todo.pop(0)
                self._held += self._plan.charge(file)
            self._stage(self._listed[file])
            with self._changed:
                self._ready.add(file)
                self._changed.notify_all()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Cancelled

    def _stage(self, file: ListedFile) -> None:
        """Prove a file that is there, or fetch it."""
        folder = self.staging.folder
        if held_bytes(folder, file) is not None:
            finding = check_file(folder, file, self._stop, _ignore)
            if finding is not None:
                put_aside(folder, file, finding.found.split()[0])
        if held_bytes(folder, file) is None:
            publish(folder, file, self._fetcher(folder).fetch(file, self._stop))
        self._reader.admit(file.path)

    def _fetch_side(self) -> None:
        fetcher = self._fetcher(self.staging.headers)

        def fetch(file: ListedFile, stop: Event) -> None:
            publish(self.staging.headers, file, fetcher.fetch(file, stop))

        run_jobs(self.staging.side, fetch, FETCH_THREADS)

    def _fetcher(self, folder: Path) -> Fetcher:
        return Fetcher(self._client, self.staging.listing, folder, RetryPolicy(), self._count)

    def _count(self, num_bytes: int) -> None:
        with self._changed:
            self.fetched_bytes += num_bytes
        self.on_fetched(self.fetched_bytes)

    def _remove_others(self, kept: Sequence[str]) -> None:
        """Remove what an earlier run held and this one would not hold now: all that is kept is in the budget."""
        others = [file for path, file in self._listed.items() if path not in set(kept) and path not in self._side_paths]
        with disk_errors(self.staging.folder):
            for file in others:
                final_path(self.staging.folder, file).unlink(missing_ok=True)
            remove_leftovers(self.staging.folder, others)

    @property
    def _side_paths(self) -> set[str]:
        return {file.path for file in self.staging.side}


def _ignore(num_bytes: int) -> None:
    """Take what nobody wants to know: bytes hashed count when they are converted."""
