"""A full disk, a failing disk, and limits of the process: a clear exit code, nothing half done, and a way on."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import small_checkpoint

from tests.faults.harness import Job, Runner, digests, each_point, make_job

Tally = Callable[[str], None]
WITHOUT_RIGHTS = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None, use_errno=True).capset(header, data) == 0
"""


@pytest.mark.parametrize(("action", "step"), [("full", 1), ("EIO", 5), ("EDQUOT", 11)])
def test_error_at_every_point(job: Job, lanes: tuple[Runner, ...], action: str, step: int, tally: Tally) -> None:
    """Writing, syncing, renaming, reserving, the journal, the index: wherever the disk fails, exit 5 and a way on."""

    def fail(own: Job, at: int) -> bool | None:
        ended = own.run(points={"at": at, "action": action})
        if ended.points < at:
            own.clear()
            return None
        if ended.code == 0:
            # it met a removal of what nobody needs, which makes no difference
            own.check_finished(ended)
        else:
            assert ended.code == 5, (at, ended.text)
            assert re.search(r"No space left|Input/output|quota exceeded", ended.text), ended.text
            assert "Traceback" not in ended.text
        own.check_unfinished()
        assert not list(own.dst.glob(".*safetensors*.partial")), "an unfinished shard keeps its space"
        own.finish_apart()
        return ended.code == 5

    refused = sum(each_point(job, lanes, fail, step))
    assert refused > 100 // step
    tally(f"disk: {job.command[0]} met {action} at {refused} points: exit 5, resumed to the same bytes, 0 wrong")


@pytest.mark.parametrize("action", ["short"])
def test_write_that_does_only_half_is_gone_on_with(job: Job, action: str) -> None:
    for at in range(1, 200, 7):
        job.finish(points={"at": at, "action": action})


def test_file_size_limit(job: Job) -> None:
    """The limit hits the fourth shard's reservation or write; without it the same command goes on."""
    ended = job.run(limits={"RLIMIT_FSIZE": 4000}, prepare=["import signal; signal.signal(signal.SIGXFSZ, 1)"])
    assert ended.code == 5, ended.text
    assert "expected room to write, found File too large" in ended.text
    job.check_unfinished()
    job.finish()


@pytest.fixture
def small_disk(work: Path) -> Iterator[Path]:
    """A file system of 64 kB; an ordinary user has to be root in a name space of his own, so there it is skipped."""
    folder = work / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("may not mount; the errors of a full disk are injected in this file's other tests")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_that_is_too_small_is_refused_before_the_first_byte(job: Job, small_disk: Path) -> None:
    src = small_checkpoint(small_disk.parent / "bigger", hidden_size=96)
    ended = job.runner(["convert", str(src), str(small_disk / "dst")], small_disk)
    assert ended.code == 5
    assert re.search(r"DST \S+: expected \d+ bytes of free space, found \d+\. Free space or choose", ended.text)
    assert not list((small_disk / "dst").glob("*.safetensors*"))


def test_disk_that_fills_up_meanwhile_can_be_freed(job: Job, small_disk: Path) -> None:
    """Another writer takes the space that was there at the start."""
    command, *options = job.command
    args = [command, str(job.src), str(small_disk / "dst"), *options]
    other = f"""
import shutil
real = shutil.disk_usage
def then_fill(folder):
    usage = real(folder)
    with open({str(small_disk / "other")!r}, "wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, 30_000)
    return usage._replace(free=1 << 40)
import os
shutil.disk_usage = then_fill
"""
    ended = job.runner(args, small_disk, prepare=[other])
    assert ended.code == 5, ended.text
    assert "No space left on device" in ended.text
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert job.runner(args, small_disk).code == 0
    assert digests(small_disk / "dst") == job.expected


def test_read_error_that_goes_away_is_survived(job: Job, tally: Tally) -> None:
    at = tried = 0
    while True:
        at += 3
        reading = {"folder": str(job.src), "at": at, "fault": "EIO"}
        ended = job.run(reading=reading)
        if ended.code == 0:
            job.check_finished(ended)
        job.clear()
        if at > 60:
            break
        assert ended.code == 0, ended.text
        tried += 1
    tally(f"disk: {job.command[0]} met one EIO at {tried} reads: read again, 0 wrong")


def test_read_error_that_stays_is_named_with_file_and_offset(job: Job, tally: Tally) -> None:
    for at in range(1, 50, 4):
        ended = job.run(reading={"folder": str(job.src), "at": at, "times": 1000, "fault": "EIO"})
        assert ended.code == 4, ended.text
        assert re.search(rf"{job.src}/\S+ at byte \d+: expected readable data, found Input/output error", ended.text)
        assert "Traceback" not in ended.text
        job.check_unfinished()
        job.finish()
    tally(f"disk: {job.command[0]} met a lasting EIO from 13 reads on: exit 4 with file and offset, 0 wrong")


def test_short_reads_give_the_same_bytes(job: Job) -> None:
    job.finish(reading={"folder": str(job.src), "at": 1, "times": 10**6, "fault": "short"})


def test_unreadable_result_is_written_again(job: Job) -> None:
    last = job.run().points
    job.clear()
    assert job.run(points={"at": last - 14, "action": "kill"}).code == -9
    job.finish(reading={"folder": str(job.dst / "model"), "at": 3, "times": 2})


def test_source_that_vanishes_meanwhile(job: Job) -> None:
    """Whether a shard or a side file: exit 4 with its name, and the same command goes on when it is back."""
    for name in ("model-00003-of-00003.safetensors", "LICENSE", "config.json"):
        lose = f"""
from converters import job
real = job.write_shards
def losing(*args):
    os.rename({str(job.src / name)!r}, {str(job.src) + "-lost"!r})
    real(*args)
import os
job.write_shards = losing
"""
        ended = job.run(prepare=[lose])
        assert ended.code == 4, ended.text
        assert str(job.src / name) in ended.text
        job.check_unfinished()
        Path(f"{job.src}-lost").rename(job.src / name)
        job.finish()


def test_few_files_may_be_open(runner: Runner, work: Path) -> None:
    """With 64 files a source of few shards works; one of 107 says which limit is in its way, and resumes without it."""
    src = small_checkpoint(work / "src", num_shards=107)
    job = make_job(runner, ("convert", "--workers", "1"), src, work)
    ended = job.run(limits={"RLIMIT_NOFILE": 64})
    assert ended.code == 5, ended.text
    assert "expected a free one of the 64 files that may be open, found none. Raise the limit" in ended.text
    job.finish()
    few = small_checkpoint(work / "few", num_shards=20)
    make_job(runner, ("convert", "--workers", "1"), few, work).finish(limits={"RLIMIT_NOFILE": 64})


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_capped_address_space_works_or_ends_with_5(runner: Runner, work: Path, command: str, tally: Tally) -> None:
    src = small_checkpoint(work / "src", vocab_size=60_000, hidden_size=96)
    options = ("--scheme", "fp8") if command == "quantize" else ("--dtype", "float32")
    job = make_job(runner, (command, *options, "--workers", "1"), src, work)
    codes = []
    # below 32 MB there is no room for a thread; above, memory ends somewhere in its work
    for megabytes in (0, 2, 12, 31, 33, 36, 40, 48, 150):
        ended = job.run(limits={"RLIMIT_AS": megabytes << 20})
        codes.append(ended.code)
        assert ended.code in (0, 5), (megabytes, ended.text)
        assert "Traceback" not in ended.text
        job.check_unfinished()
        job.finish()
    assert set(codes) == {0, 5}
    tally(f"disk: {command} with 0 to 150 MB of address space left: exit {', '.join(map(str, codes))}, 0 wrong")


def test_output_that_may_not_be_written_is_refused(job: Job) -> None:
    job.dst.mkdir()
    job.dst.chmod(0o555)
    ended = job.run(prepare=[WITHOUT_RIGHTS])
    assert ended.code == 2, ended.text
    assert f"{job.dst}/.glm4moe: Permission denied. Check its owner and permissions." in ended.text
    job.dst.chmod(0o755)
    job.finish(prepare=[WITHOUT_RIGHTS])


def test_output_below_a_file_is_refused(job: Job, work: Path) -> None:
    (work / "file").touch()
    for dst in (work / "file", work / "file" / "sub"):
        ended = job.runner(["convert", str(job.src), str(dst)], work)
        assert ended.code == 2, ended.text
        assert "Traceback" not in ended.text


def test_source_that_may_not_be_read_is_named(job: Job) -> None:
    (job.src / "model-00002-of-00003.safetensors").chmod(0)
    ended = job.run(prepare=[WITHOUT_RIGHTS])
    assert ended.code == 4, ended.text
    assert f"{job.src}/model-00002-of-00003.safetensors: expected readable data, found Permission denied" in ended.text


def test_leftovers_of_a_crash_do_not_stay(job: Job) -> None:
    """Unfinished files have a new name in each run; the next one removes those of the last."""
    for at in (40, 60, 80):
        assert job.run(points={"at": at, "action": "kill"}).code == -9
    assert len(list(job.dst.glob(".*.partial"))) <= 2
    (job.dst / ".model-00001-of-00006.safetensors.0123abcd.partial").write_bytes(bytes(10))
    (job.dst / ".config.json.0123abcd.partial").write_bytes(bytes(10))
    job.finish()


def test_file_system_without_hard_links_or_locks(job: Job) -> None:
    """FUSE and some cluster file systems have neither."""
    none = """
import errno, fcntl, os
def refuse(*args, **named):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
os.link = fcntl.flock = refuse
"""
    assert job.run(prepare=[none], points={"at": 60, "action": "kill"}).code == -9
    job.check_unfinished()
    job.finish(prepare=[none])
