"""Transforms carried out by something else than the CPU: same bytes, same job, and proof of it."""

import threading
from pathlib import Path

import pytest
import torch
from quantizing import checkpoint, options_for

from converters.accelerator import Proved
from converters.errors import UsageError
from converters.job import Outcome, run
from converters.pipeline import BLOCK_BYTES, RunOptions
from converters.quant.scheme import Arithmetic
from converters.quantize import plan_quantize
from converters.source import open_source
from converters.transforms.quantize import QuantizeFp8Block, QuantizeFp8Channel
from converters.transforms.restore import is_quantizing
from converters.transforms.rows import Copy, RowTransform

CHANNEL = QuantizeFp8Channel(Arithmetic.FLOAT32)


class Fake:
    """The transforms themselves, into buffers that are used again; every so many blocks are left to the CPU."""

    name = "fake"
    block_bytes = 1 << 15

    def __init__(self, leave_every: int = 0, damage: int | None = None) -> None:
        self.calls: list[RowTransform] = []
        self.left = 0
        self._leave_every = leave_every
        self._damage = damage
        self._lock = threading.Lock()
        self._buffers = threading.local()

    def supports(self, transform: RowTransform) -> bool:
        return is_quantizing(transform)

    def apply(
        self, transform: RowTransform, rows_RC: torch.Tensor, *beside: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        if not self.supports(transform):
            return None
        with self._lock:
            self.calls.append(transform)
            if self._leave_every and len(self.calls) % self._leave_every == 0:
                self.left += 1
                return None
        for buffer in getattr(self._buffers, "last", ()):
            buffer.view(-1).view(torch.uint8).fill_(0xAB)
        made = tuple(output.clone() for output in transform(rows_RC, *beside))
        if self._damage is not None:
            made[self._damage].view(-1).view(torch.uint8)[0] ^= 1
        self._buffers.last = made
        return made


def quantized(src: Path, dst: Path, scheme: str, options: RunOptions, **chosen: str) -> Outcome:
    with open_source(src) as source:
        return run(plan_quantize(source, options_for(src, scheme, **chosen)), dst, options, lambda _: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("scheme", "chosen"),
    [("fp8", {}), ("fp8-block", {"format": "modelopt"}), ("nvfp4-weight-only", {}), ("experts=int8", {})],
)
def test_result_and_job_do_not_depend_on_it(tmp_path: Path, scheme: str, chosen: dict[str, str]) -> None:
    src, fake = checkpoint(tmp_path / "src"), Fake(leave_every=5)
    quantized(src, tmp_path / "cpu", scheme, RunOptions(2), **chosen)
    quantized(src, tmp_path / "fake", scheme, RunOptions(2, accelerator=fake), **chosen)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "fake")
    assert len(fake.calls) > fake.left > 0
    # the same job: it is finished
    assert quantized(src, tmp_path / "fake", scheme, RunOptions(1), **chosen).already_finished


def test_blocks_are_as_large_as_it_asks_for_within_max_memory(tmp_path: Path) -> None:
    fake = Fake()
    with open_source(checkpoint(tmp_path / "src")) as source:
        units = [
            unit
            for shard in plan_quantize(source, options_for(tmp_path / "src", "fp8")).plan.shards
            for unit in shard.units
        ]
    made = next(unit for unit in units if fake.supports(unit.transform))
    copied = next(unit for unit in units if isinstance(unit.transform, Copy))
    assert RunOptions(1).block_rows(made, 64) == BLOCK_BYTES // 64
    assert RunOptions(1, accelerator=fake).block_rows(made, 64) == fake.block_bytes // 64
    assert RunOptions(1, accelerator=fake).block_rows(copied, 64) == RunOptions(1).block_rows(copied, 64)
    small = RunOptions(2, 50_000, fake)
    assert small.block_rows(made, 64) == int(50_000 / 2 / made.working_bytes) // 64


def test_proof_passes_right_bytes_and_is_made_once_for_each_kind() -> None:
    proved = Proved(Fake())
    assert (proved.name, proved.block_bytes) == ("fake", Fake.block_bytes)
    assert proved.supports(CHANNEL)
    assert not proved.supports(Copy())
    for columns in (16, 16, 32):
        rows_RC = torch.randn(9, columns)
        made = proved.apply(CHANNEL, rows_RC)
        assert made is not None
        for ours, theirs in zip(made, CHANNEL(rows_RC), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert proved.apply(Copy(), torch.ones(2, 2)) is None


@pytest.mark.parametrize("damage", [0, 1])
@pytest.mark.parametrize("transform", [CHANNEL, QuantizeFp8Block(Arithmetic.FLOAT32)])
def test_proof_refuses_other_bytes(transform: RowTransform, damage: int) -> None:
    with pytest.raises(UsageError) as refused:
        Proved(Fake(damage=damage)).apply(transform, torch.randn(300, 130, dtype=torch.float32))
    assert str(refused.value) == (
        f"--device fake: expected the bytes that the CPU makes, found others in {transform.name}. "
        "Use --device cpu, and report the versions that 'glm4moe doctor' shows."
    )


def test_wrong_bytes_end_a_run(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "src")
    with pytest.raises(UsageError, match="others in fp8 per channel"):
        quantized(src, tmp_path / "dst", "fp8", RunOptions(2, accelerator=Proved(Fake(damage=0))))
    assert not (tmp_path / "dst" / "config.json").exists()
