"""Copies: in bytes, without torch; the bytes and digests are those of the way through tensors."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint
from safetensors.torch import save_file

from converters.blocks import as_bytes
from converters.checkpoint.content_digest import Algorithm
from converters.checkpoint.plan import Beside, Columns, OutputTensor, SourceRows, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.copying import Copying, begin, is_bytewise
from converters.digests import SourceDigest
from converters.making import Making
from converters.pipeline import Run, RunOptions
from converters.prove import source_digest_of
from converters.transforms.rows import Cast, Copy

LEFT, RIGHT = "a", "b"
# a subprocess: this one has torch
PROGRAM = """
import sys
from glm4moe_cli.main import run
for command in {commands!r}:
    assert run(command) == 0, command
assert "converters.pipeline" in sys.modules
assert "torch" not in sys.modules
"""


def test_what_only_copies_needs_no_torch(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", num_attention_heads=8)
    there, cut, anew, back = (str(tmp_path / name) for name in ("there", "cut", "anew", "back"))
    commands = [
        ["convert", str(src), there, "--layout", "packed", "-q"],
        ["shard", str(src), cut, "--tp", "2", "-q"],
        ["shard", cut, anew, "--reshard", "--tp", "1", "-q"],
        ["shard", cut, back, "--merge", "-q"],
    ]
    subprocess.run([sys.executable, "-c", PROGRAM.format(commands=commands)], check=True)


def columns(start: int, stop: int) -> Columns:
    return Columns(start, stop, 48)


UNITS = {
    "rows": (SourceRows(LEFT, 3, 37),),
    "rows of two": (SourceRows(LEFT, 0, 40), SourceRows(RIGHT, 5, 6)),
    "columns": (SourceRows(LEFT, 0, 40, columns(7, 19)),),
    "side by side": (SourceRows(LEFT, 0, 40, right=SourceRows(RIGHT, 0, 40, right=SourceRows(LEFT, 0, 40))),),
    "columns side by side": (SourceRows(LEFT, 2, 40, columns(1, 3), right=SourceRows(RIGHT, 0, 38, columns(40, 48))),),
}


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64], ids=str)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointReader]:
    generator = torch.Generator().manual_seed(0)
    tensors = {n: (torch.randn(40, 48, generator=generator) * 50).to(request.param) for n in (LEFT, RIGHT)}
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("max_memory", [1000, 1 << 20])
def test_bytes_and_digests_are_those_of_the_way_through_tensors(
    reader: CheckpointReader, name: str, max_memory: int
) -> None:
    sources = UNITS[name]
    made = {}
    for kind in (Copying, Making):
        unit = Unit((OutputTensor("y", reader.entry(LEFT).dtype, (1, 1)),), sources, Copy())
        digest, run = SourceDigest(), Run(reader, RunOptions(1, max_memory), lambda _: None)
        blocks = [(row, as_bytes(block, run.cuts).tobytes()) for row, (block,) in kind(unit, run, digest).blocks()]
        made[kind] = blocks, digest.found
        assert digest.found == source_digest_of(reader, unit, 100, Algorithm.XXH3)
    assert made[Copying] == made[Making]
    assert len(made[Copying][0]) > (max_memory == 1000)


def test_who_makes_a_unit_follows_from_what_has_to_be_understood() -> None:
    output, rows = (OutputTensor("y", "BF16", (4, 4)),), SourceRows(LEFT, 0, 4)
    beside = SourceRows(LEFT, 0, 4, beside=(Beside(RIGHT, 0, 0, 1),))
    assert is_bytewise(Unit(output, (rows,), Copy()))
    assert not is_bytewise(Unit(output, (rows,), Cast("BF16")))
    assert not is_bytewise(Unit(output, (), Copy()))
    assert not is_bytewise(Unit(output, (beside,), Copy()))
    assert not is_bytewise(Unit(output, (rows, SourceRows(LEFT, 0, 4, right=beside)), Copy()))


def test_begin_chooses(reader: CheckpointReader) -> None:
    run, output = Run(reader, RunOptions(1), lambda _: None), (OutputTensor("y", "BF16", (40, 48)),)
    assert isinstance(begin(Unit(output, UNITS["rows"], Copy()), run, None), Copying)
    assert isinstance(begin(Unit(output, UNITS["rows"], Cast("F32")), run, None), Making)
