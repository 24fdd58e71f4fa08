"""What a resume trusts: nothing that it cannot prove. Damaged state, damaged shards, a source that changed."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters.checkpoint.content_digest import Algorithm, ContentDigest
from converters.checkpoint.journal import ShardRecord, TensorRecord, append_journal, read_journal
from tests.faults.harness import KILLED, Job, digests, make_job

Tally = Callable[[str], None]
FLIPS = 2000
RUN_FLIPS = 12


@pytest.fixture
def unfinished(job: Job) -> Job:
    """A job that was killed with most of its shards done."""
    last = job.run().points
    job.clear()
    assert job.run(points={"at": last - 30, "action": "kill"}).code == KILLED
    return job


def known(shard: int, tensor: int) -> TensorRecord:
    return TensorRecord(*(ContentDigest(own, f"{shard}{tensor}") for own in (Algorithm.SHA256, Algorithm.XXH3)))


@pytest.fixture
def journal(tmp_path: Path) -> dict[str, ShardRecord]:
    """A journal in tmp_path with three shards."""
    records = [
        ShardRecord(f"model-{n}.safetensors", 100 + n, {f"t{n}.{i}": known(n, i) for i in range(3)}) for n in range(3)
    ]
    for record in records:
        append_journal(tmp_path, record, "journal.jsonl")
    return {record.file: record for record in records}


def test_journal_cut_at_every_byte_keeps_the_lines_before(
    tmp_path: Path, journal: dict[str, ShardRecord], tally: Tally
) -> None:
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    starts = [index for index in range(len(whole)) if whole[index : index + 2] == b"\n\n"]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = read_journal(tmp_path)
        assert found.items() <= journal.items()
        assert len(found) >= sum(start < length for start in starts)
        # the line that a resume appends is not lost behind the half one
        append_journal(tmp_path, journal["model-2.safetensors"], "journal.jsonl")
        assert "model-2.safetensors" in read_journal(tmp_path)
    tally(f"state: journal cut at each of {len(whole)} bytes, 0 wrong records")


def test_journal_with_flipped_bits_gives_no_wrong_record(
    tmp_path: Path, journal: dict[str, ShardRecord], tally: Tally
) -> None:
    """A changed digest of source bytes would otherwise get into the manifest unseen."""
    path, chosen = tmp_path / "journal.jsonl", random.Random(3)
    whole = path.read_bytes()
    lost = 0
    for _ in range(FLIPS):
        data = bytearray(whole)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
        found = read_journal(tmp_path)
        assert found.items() <= journal.items()
        lost += len(journal) - len(found)
    assert lost > FLIPS // 2
    tally(f"state: {FLIPS} bits flipped in a journal, 0 wrong records")


@pytest.mark.parametrize("name", ["journal.jsonl", "source.json", "files.json", "job.json"])
def test_run_after_a_damaged_state_file_is_right_or_refused(
    unfinished: Job, work: Path, name: str, tally: Tally
) -> None:
    shutil.copytree(unfinished.dst, work / "unfinished")
    chosen, refused = random.Random(name), 0
    for number in range(RUN_FLIPS):
        unfinished.clear()
        shutil.copytree(work / "unfinished", unfinished.dst)
        path = unfinished.dst / ".glm4moe" / name
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            del data[chosen.randrange(len(data)) :]
        elif number % 3 == 1:
            data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        else:
            data[:] = chosen.randbytes(len(data))
        path.write_bytes(data)
        ended = unfinished.run()
        if ended.code != 0:
            assert name == "job.json", ended.text
            assert ended.code in (2, 4)
            assert "--restart" in ended.text
            refused += 1
            ended = unfinished.run("--restart")
        unfinished.check_finished(ended)
    tally(f"state: {name} damaged {RUN_FLIPS} times, {refused} refused, {RUN_FLIPS - refused} redone, 0 wrong")


@pytest.mark.parametrize("name", ["journal.jsonl", "source.json", "files.json", "job.json"])
def test_lost_state_file_is_made_up_for_or_refused(unfinished: Job, name: str) -> None:
    (unfinished.dst / ".glm4moe" / name).unlink()
    ended = unfinished.run()
    if name == "job.json":
        # nothing says any more whose files these are
        assert ended.code == 2
        assert "expected an empty or new folder, found files in it" in ended.text
    else:
        unfinished.check_finished(ended)


@pytest.mark.parametrize("job", ["quantize"], indirect=True)
def test_journal_without_its_job_is_not_trusted(job: Job) -> None:
    """Its shards are another job's, of the same names, sizes and headers."""
    other = ("--arithmetic", "compressed-tensors")
    last = job.run(*other).points
    job.clear()
    assert job.run(*other, points={"at": last - 30, "action": "kill"}).code == KILLED
    (job.dst / ".glm4moe" / "job.json").unlink()
    for path in list(job.dst.iterdir()):
        if path.is_file():
            path.rename(job.dst / ".glm4moe" / path.name)
    # the journal stands alone; were its shards there, this would be refused
    assert job.run(points={"at": 25, "action": "kill"}).code == KILLED
    assert not read_journal(job.dst / ".glm4moe")


@pytest.mark.parametrize("field", ["command", "version", "options", "source", "plan"])
def test_unfinished_folder_of_another_job_is_refused_naming_the_field(unfinished: Job, field: str) -> None:
    path = unfinished.dst / ".glm4moe" / "job.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps(recorded | {field: "other"}))
    ended = unfinished.run()
    assert ended.code == 2
    assert f"{field}: expected 'other', as the unfinished job in it" in ended.text
    assert "begin anew with --restart" in ended.text
    unfinished.check_finished(unfinished.run("--restart"))


def test_other_command_does_not_touch_an_unfinished_folder(unfinished: Job) -> None:
    before = {path: path.read_bytes() for path in unfinished.dst.rglob("*") if path.is_file() and path.name != "lock"}
    other = ("--dtype", "float32") if unfinished.command[0] == "convert" else ("--arithmetic", "compressed-tensors")
    ended = unfinished.run(*other)
    assert ended.code == 2
    assert "options: expected" in ended.text
    assert {path: path.read_bytes() for path in before} == before
    unfinished.finish()


def test_finished_shard_that_was_replaced_is_noticed_and_redone(unfinished: Job, tally: Tally) -> None:
    """Same name, same size, same times: only the bytes tell."""
    shards = sorted(unfinished.dst.glob("*.safetensors"))
    assert len(shards) > 3
    for number, path in enumerate(shards[:3]):
        status = path.stat()
        data = bytearray(path.read_bytes())
        if number == 0:
            data[:] = os.urandom(len(data))
        else:
            # the last bytes are data; so only what is read and hashed shows it
            data[-number] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    ended = unfinished.run()
    assert "redone\t3 shards" in ended.text
    unfinished.check_finished(ended)
    tally(f"state: {unfinished.command[0]}: 3 finished shards replaced by other bytes of the same size, 3 redone")


def test_source_that_changed_is_refused_naming_the_tensor(unfinished: Job) -> None:
    """One weight is another, size and times are as they were."""
    path = unfinished.src / "model-00001-of-00003.safetensors"
    status = path.stat()
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[5] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    ended = unfinished.run()
    assert ended.code == 4
    assert f"source tensor {name}: expected the bytes that the unfinished run read, found others" in ended.text
    assert unfinished.run("--restart").code == 0


def test_source_that_changed_before_anything_was_converted_is_no_obstacle(job: Job, work: Path) -> None:
    """All that is in the result was read after the change."""
    assert job.run(points={"at": 30, "action": "kill"}).code == KILLED
    assert not read_journal(job.dst / ".glm4moe")
    for path in job.src.glob("*.safetensors"):
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert job.run().code == 0
    fresh = make_job(job.runner, job.command, job.src, work / "fresh")
    assert digests(job.dst) == fresh.expected != job.expected


def test_source_that_was_only_touched_or_copied_is_no_other(unfinished: Job, work: Path) -> None:
    shutil.copytree(unfinished.src, work / "copy")
    shutil.rmtree(unfinished.src)
    (work / "copy").rename(unfinished.src)
    for path in unfinished.src.iterdir():
        os.utime(path, (1, 1))
    ended = unfinished.run()
    assert "proved by content" in ended.text
    unfinished.check_finished(ended)
