"""Threads that start whole or not at all, also where memory is about to end."""

import errno
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

# the stack of a new thread, an arena of the allocator, and what the interpreter and torch keep for each thread
ROOM_BYTES = 32 << 20


def start_pool(num_workers: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose threads all run; the caller shuts it down.

    A thread that meets the end of memory before its first own instruction dies without a word, and `Thread.start`
    waits for it forever; in torch's thread-local data the whole process aborts. So all threads start before any of
    them has work, each only where there is room for it.

    Raises:
        MemoryError: there is no room for a thread.
    """
    pool, gate = ThreadPoolExecutor(num_workers, name), threading.Event()
    with ExitStack() as undo:
        undo.callback(pool.shutdown)
        undo.callback(gate.set)
        for _ in range(num_workers):
            check_room()
            # each waits, so that the pool starts one more for the next
            pool.submit(gate.wait)
        # before the pool is let go: one that is interrupted here must not wait for its gate at exit
        gate.set()
        undo.pop_all()
    return pool


def check_room() -> None:
    """Check that a thread could be started now.

    Raises:
        MemoryError: the address space, or what the process may use of it, has no room for one.
    """
    try:
        mmap.mmap(-1, ROOM_BYTES).close()
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"no room for a thread: {ROOM_BYTES >> 20} MiB") from error
