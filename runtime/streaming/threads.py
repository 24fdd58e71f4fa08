"""How many threads compute beside those that read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.streaming.options import StreamOptions

# rows of a run up to which reading, not computing, is what takes the time
FEW_ROWS = 64


@contextmanager
def computing_threads(num_rows: int, options: StreamOptions) -> Iterator[None]:
    """Leave a core to each thread that reads for the length of the context, if rows are few.

    Products of few rows are short, and all threads that compute one wait for the last of them: with as many as there
    are cores, that is one which a reading thread has driven from its core. Deterministic mode computes as the model in
    memory does, with as many threads.
    """
    before = torch.get_num_threads()
    if num_rows <= FEW_ROWS and options.device == "cpu" and not options.deterministic:
        torch.set_num_threads(max(1, before - options.workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
