"""Calibration without a tokenizer: token ids go in as windows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from converters.source import open_source
from runtime.calibrate.options import CalibrateOptions
from runtime.calibrate.run import CalibrationJob
from runtime.calibrate.text import CalibrationText


def random_windows(*lengths: int, vocab_size: int = 64, seed: int = 3) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(0, vocab_size, (n,), generator=generator).tolist()) for n in lengths)


@contextmanager
def job_on(folder: Path, windows: tuple[tuple[int, ...], ...], **options: object) -> Iterator[CalibrationJob]:
    with open_source(folder) as source:
        text = CalibrationText(windows, ({"sha256": "0" * 64},), sum(map(len, windows)))
        yield CalibrationJob(source, text, CalibrateOptions(**{"min_expert_tokens": 0, **options}))


@pytest.fixture
def windows() -> tuple[tuple[int, ...], ...]:
    """Three windows of different lengths."""
    return random_windows(33, 20, 7)
