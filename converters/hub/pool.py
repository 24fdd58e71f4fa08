"""Jobs on threads that never keep a program from stopping."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from threading import Event, Thread
from types import TracebackType
from typing import TypeVar

from converters.waiting import wait_for_all
from converters.workers import check_room

Item = TypeVar("Item")
# what a stopped thread has for its last checkpoint; one that waits for a silent server is left behind
GRACE_SECONDS = 2.0


class Cancelled(BaseException):
    """The run is stopping; whoever sees this leaves everything resumable and returns."""


def run_jobs(items: Iterable[Item], work: Callable[[Item, Event], None], num_workers: int) -> None:
    """Call `work(item, stop)` for every item, on daemon threads; raise what the first failing one raised.

    Once something fails, or this thread is interrupted, `stop` is set and no other item is begun. Threads that do not
    end within GRACE_SECONDS are abandoned: they end with the process, and may write nothing after they saw `stop`.
    """
    stop, todo = Event(), deque(items)

    def loop() -> None:
        while todo and not stop.is_set():
            try:
                item = todo.popleft()
            except IndexError:  # another thread was faster
                return
            work(item, stop)

    ended: list[Future[None]] = []
    try:
        # where there is no room for the last of them, those before it have begun
        for _ in range(min(num_workers, len(todo))):
            ended += start_threads(loop, 1)
        wait_for_all(ended)
    finally:
        stop.set()
        wait(ended, timeout=GRACE_SECONDS)


def start_threads(loop: Callable[[], None], count: int) -> list["Future[None]"]:
    """Run a loop on daemon threads; each future ends with its thread, with what the loop raised, if not Cancelled."""
    ended: list[Future[None]] = [Future() for _ in range(count)]
    for future in ended:
        check_room()
        Thread(target=_report, args=(loop, future), name="download", daemon=True).start()
    return ended


def _report(loop: Callable[[], None], future: "Future[None]") -> None:
    with _Outcome(future):
        loop()


class _Outcome:
    """Hands the end of a thread, an exception included, to a future."""

    def __init__(self, future: "Future[None]") -> None:
        self.future = future

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        if error is None or isinstance(error, Cancelled):
            self.future.set_result(None)
        else:
            self.future.set_exception(error)
        return True
