"""One row of fp32 per token of the text: in memory, or mapped from a scratch file that has no name."""

import mmap
import os as os
import tempfile
from pathlib import Path

import torch

from converters.checkpoint.writer import disk_errors


def token_matrix(num_tokens: int, width: int, scratch: Path | None) -> torch.Tensor:
    """Return (num_tokens, width) fp32 zeros on the CPU.

    Args:
        num_tokens: rows.
        width: columns.
        scratch: folder for a file to map; None = plain memory.
    Raises:
        ResourceError: the disk has no room. It is reserved here: a mapped hole on a full disk would end the process.
    """
    if scratch is None:
        return torch.zeros(num_tokens, width)
    size = num_tokens * width * torch.float32.itemsize
    with disk_errors(scratch), tempfile.TemporaryFile(dir=scratch) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=torch.float32).view(num_tokens, width)
