"""Waiting for threads in a way that a signal ends soon."""

from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

# a signal that arrives just before the main thread sleeps does not wake it: it is noticed when the thread wakes
NOTICE_SECONDS = 1.0


def wait_for_all(futures: "Collection[Future[Any]]") -> None:
    """Wait until all have ended, or one has failed; raise what the first failed one raised."""
    while True:
        done, left = wait(futures, timeout=NOTICE_SECONDS, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if not left:
            return
