"""10,000 damaged headers, indices and configs: each refused with an error of ours, or read as the library reads it.

Accepting what the library refuses, or other names, shapes, dtypes or bytes than it finds, fails; so does any other
exception, a slow case, or memory that grows. Seeded: a failure says its number, and the same number fails again.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint
from safetensors import safe_open

from converters.checkpoint.index import INDEX_FILE
from converters.checkpoint.reader import CheckpointReader
from converters.config import CONFIG_FILE
from converters.errors import Glm4MoeError
from converters.source import open_source
from glm4moe_cli.main import run
from tests.faults.conftest import TINY
from tests.faults.mutate import join, mutate_bytes, mutate_json, split

SHARD = "model-00002-of-00003.safetensors"
FILES = {"header": SHARD, "index": INDEX_FILE, "config": CONFIG_FILE, "quantized config": CONFIG_FILE}
CASES = {"header": 6000, "index": 2000, "config": 1000, "quantized config": 1000}
# of this thread's own time: what else the machine does must not count
MAX_SECONDS = 10.0
MAX_GROWTH_BYTES = 256 << 20


@pytest.fixture
def src(work: Path) -> Path:
    return small_checkpoint(work / "src", num_shards=3, mtp_copies=False, **TINY)


def quantized(src: Path) -> Path:
    """Return the checkpoint in FP8, with its quantization_config."""
    dst = src.parent / "fp8"
    assert run(["quantize", str(src), str(dst), "--scheme", "fp8", "--max-shard-size", "20kB", "-q"]) == 0
    return dst


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def damage(kind: str, original: bytes, chosen: random.Random) -> bytes:
    """Return a damaged version of a shard, an index or a config."""
    if kind != "header":
        return mutate_json(json.loads(original), chosen) if chosen.random() < 0.6 else mutate_bytes(original, chosen)
    header, data = split(original)
    match chosen.randrange(10):
        case 0:
            return mutate_bytes(original, chosen)
        case 1:
            # the length says something else than there is
            length = chosen.choice(
                (0, 1, len(header) - 1, len(header) + 1, chosen.getrandbits(chosen.choice((20, 64))))
            )
            return length.to_bytes(8, "little") + original[8:]
        case 2 | 3:
            return join(mutate_bytes(header, chosen), data)
        case 4:
            # a header and its length may agree, and the data be short or long
            return join(header + b" " * chosen.randrange(3), mutate_bytes(data, chosen))
        case _:
            return join(mutate_json(json.loads(header), chosen), data)


def check_accepted(reader: CheckpointReader) -> None:
    """Compare all that was accepted with what the library finds in the same files."""
    found = {}
    for file in reader.index.files:
        with safe_open(reader.index.folder / file, framework="pt") as library:
            for name in library.keys():  # noqa: SIM118 - it is no mapping
                found[name] = library.get_tensor(name)
    assert found.keys() == set(reader.names)
    for name, tensor in found.items():
        ours = reader.read(name)
        assert ours.dtype == tensor.dtype, name
        assert ours.shape == tensor.shape, name
        assert torch.equal(ours.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def verdict(src: Path, open_folder: Callable[[Path], object]) -> str:
    """Return the kind of refusal, or `accepted` after the comparison; anything else raises."""
    try:
        opened = open_folder(src)
    except Glm4MoeError as error:
        return error.code if 0 < len(str(error)) < 2000 else "a message that nobody reads"
    with opened if isinstance(opened, CheckpointReader) else opened.reader as reader:
        check_accepted(reader)
    return "accepted"


@pytest.mark.parametrize("kind", CASES)
def test_damaged_file_is_refused_or_read_as_the_library_reads_it(
    src: Path, kind: str, tally: Callable[[str], None]
) -> None:
    if kind == "quantized config":
        src = quantized(src)
    path = src / FILES[kind]
    original, verdicts, slowest = path.read_bytes(), Counter(), 0.0
    # headers alone, too: the schema would refuse most of them before anything is compared
    gates = (open_source, CheckpointReader.open)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for number in range(CASES[kind]):
        path.write_bytes(damage(kind, original, random.Random(f"{kind} {number}")))
        start = time.thread_time()
        try:
            verdicts[verdict(src, gates[number % 2 if kind == "header" else 0])] += 1
        except Exception as error:
            error.add_note(f"case {kind} {number}: {path.read_bytes()[:3000]!r}")
            raise
        slowest = max(slowest, time.thread_time() - start)
    assert slowest < MAX_SECONDS
    assert resident("VmHWM") - before < MAX_GROWTH_BYTES
    assert verdicts["accepted"] < CASES[kind] // 2
    assert verdicts["accepted"] > 0
    assert verdicts.keys() <= {"input", "config", "security", "accepted"}
    counts = ", ".join(f"{count} {name}" for name, count in verdicts.most_common())
    tally(f"fuzz: {CASES[kind]} damaged {kind} files: {counts}; slowest {slowest:.2f} s, 0 wrong")
