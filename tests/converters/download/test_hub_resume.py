"""Stopping and going on: kill -9, signals, two processes, a branch that moves, damage between runs, no network."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub, Fault, read_folder, sha256

from converters.checkpoint.lock import locked
from converters.errors import InputError, LockedError, NetworkError, UsageError
from converters.hub import partial
from converters.hub.pool import run_jobs

ROOT = Path(__file__).parents[3]
SHARD = "model-00001-of-00002.safetensors"
STEP = 1 << 20
BIG_BYTES = 24 << 20
# longer than anything takes that goes on at all
PATIENCE_SECONDS = 300
PATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE_SECONDS)}
PROGRAM = f"""
import sys
from converters.hub import partial
partial.SYNC_BYTES = {STEP}
from glm4moe_cli.main import main
sys.argv[0] = "glm4moe"
main()
"""
Download = Callable[..., object]


@pytest.fixture(scope="module")
def big_file() -> bytes:
    return os.urandom(BIG_BYTES)


@pytest.fixture
def big_hub(big_file: bytes) -> Iterator[FakeHub]:
    """A hub with one large file, for programs that are killed."""
    hub = FakeHub({"config.json": b"{}", "big.safetensors": big_file})
    yield hub
    hub.close()


def command(dst: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "download", REPO, str(dst), "--include", "*"]


def environment(hub: FakeHub) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": "/nonexistent", "NO_PROXY": "127.0.0.1", **PATIENT}


def start(hub: FakeHub, dst: Path) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(dst), cwd=ROOT, env=environment(hub), text=True, **pipes)


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def recorded(dst: Path) -> int:
    """Return how many bytes of the big file are recorded as safe."""
    records = [path.read_text() for path in (dst / ".glm4moe" / "partial").glob("big*.offset")]
    return max((int(text.split()[1]) for text in records if text), default=0)


def test_kill_9_loses_no_more_than_a_step(big_hub: FakeHub, big_file: bytes, tmp_path: Path) -> None:
    """Killed twice in the middle of a file; the server's count of bytes is what is judged, not ours."""
    dst = tmp_path / "dst"
    for part in (1, 2):
        # the server stops there, and is waited for until all that it sent before is in the program's hands
        sent = big_hub.served["big.safetensors"]
        big_hub.fail("big.safetensors", Fault(piece=64 << 10, hold=BIG_BYTES // 3))
        process = start(big_hub, dst)
        here = recorded(dst) + BIG_BYTES // 3 - STEP
        wait_until(lambda here=here: recorded(dst) > here, process)
        process.kill()
        process.communicate()
        assert big_hub.served["big.safetensors"] == sent + BIG_BYTES // 3, part
        assert not (dst / "big.safetensors").exists()
        assert not (dst / "config.json").exists()
    process = start(big_hub, dst)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert (dst / "big.safetensors").read_bytes() == big_file
    assert big_hub.served["big.safetensors"] - BIG_BYTES <= 2 * STEP
    assert f"Going on with commit {big_hub.commit}" in stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signal_stops_at_once_and_loses_nothing_that_was_read(
    big_hub: FakeHub, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    dst = tmp_path / "dst"
    big_hub.fail("big.safetensors", Fault(piece=64 << 10, hold=BIG_BYTES // 3, pause_after=0.05))
    process = start(big_hub, dst)
    wait_until(lambda: recorded(dst) > BIG_BYTES // 3 - STEP, process)
    process.send_signal(number)
    # what comes now comes slowly: the rest would take a quarter of a minute
    big_hub.go.set()
    _, stderr = process.communicate()
    assert process.returncode == code
    assert stderr.splitlines()[-1].endswith("Run the same command again to go on from here.")
    assert not (dst / "big.safetensors").exists()
    assert recorded(dst) >= BIG_BYTES // 3 - STEP


def test_signal_does_not_wait_for_a_silent_server(big_hub: FakeHub, tmp_path: Path) -> None:
    """Threads in a read cannot be woken; they are left behind."""
    big_hub.fail("big.safetensors", Fault(hold=-1))
    process = start(big_hub, tmp_path / "dst")
    wait_until(lambda: bool(big_hub.asked("big.safetensors")), process)
    process.terminate()
    # the server says nothing before this is over
    process.communicate()
    assert process.returncode == 75


def test_second_run_into_the_same_folder_is_refused(hub: FakeHub, download: Download, dst: Path) -> None:
    with locked(dst):
        with pytest.raises(LockedError) as raised:
            download()
        assert raised.value.found.startswith(f"process {os.getpid()} on ")
    download()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that only pretends to lock."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)


@pytest.mark.usefixtures("without_locks")
def test_run_that_is_overtaken_writes_nothing_into_the_finished_file(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three stands still in the middle of a file, and gets wrong bytes when the others are done.

    All runs once wrote into one partial file, which had its final name by then.
    """
    hub.fail(SHARD, Fault(body=os.urandom(len(checkpoint_files[SHARD]))))
    append, pieces, others = partial.PartialFile.append, 0, []

    def standing_still(self: partial.PartialFile, data: bytes) -> None:
        nonlocal pieces
        pieces += self.file.path == SHARD
        if pieces == 3 and not others:
            others.append(None)
            others[:] = [download(), download()]
        append(self, data)

    monkeypatch.setattr(partial.PartialFile, "append", standing_still)
    with pytest.raises(LockedError, match="expected a folder that nobody else changes"):
        download(num_workers=1)
    assert len(others) == 2
    assert read_folder(dst) == checkpoint_files
    assert download().num_bytes == 0
    assert sorted(path.name for path in (dst / ".glm4moe").iterdir()) == ["listing.json", "lock"]


@pytest.mark.usefixtures("without_locks")
def test_three_runs_without_a_working_lock_do_no_harm(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All begin every file at once; each run ends well or says that another one is there, and no file is wrong."""
    together = threading.Barrier(3)
    enter = partial.PartialFile.__enter__

    def entered(self: partial.PartialFile) -> partial.PartialFile:
        # the one that is alone by now does not wait
        with suppress(threading.BrokenBarrierError):
            together.wait(0.2)
        return enter(self)

    monkeypatch.setattr(partial.PartialFile, "__enter__", entered)
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            download(num_workers=1)
        except LockedError as error:
            ended.append(error)
        else:
            ended.append(None)

    for _ in range(3):
        together.reset()
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = read_folder(dst)
        assert found.items() <= checkpoint_files.items()
        assert found == checkpoint_files or None not in ended[-3:]
        assert "config.json" not in found or found == checkpoint_files
        download()
        assert read_folder(dst) == checkpoint_files
        shutil.rmtree(dst)
    # an exception of another kind would have ended a thread without a word
    assert len(ended) == 9


def test_branch_that_moves_meanwhile_changes_nothing(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    first = hub.commit
    hub.fail(SHARD, *[Fault(cut=0)] * 6)
    with pytest.raises(NetworkError):
        download()
    second = hub.push("main", {**checkpoint_files, SHARD: b"another", "LICENSE": b"another"})
    download()
    assert read_folder(dst) == checkpoint_files
    assert json.loads((dst / ".glm4moe" / "listing.json").read_text())["commit"] == first
    with pytest.raises(UsageError) as raised:
        download(revision="main")
    assert str(raised.value) == (
        f"--revision main: expected commit {first}, which {dst} was begun with, found commit {second}. "
        "Leave --revision out to go on with the former, or choose another folder for the latter."
    )
    download(revision=first)


def test_another_repository_or_foreign_files_are_refused(hub: FakeHub, download: Download, dst: Path) -> None:
    dst.mkdir()
    (dst / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="other files in it"):
        download()
    (dst / "mine.txt").unlink()
    download()
    path = dst / ".glm4moe" / "listing.json"
    path.write_text(path.read_text().replace(REPO, "acme/other"))
    with pytest.raises(UsageError, match="found a download of acme/other"):
        download()


def test_unfinished_conversion_is_not_taken_for_an_empty_folder(download: Download, hub: FakeHub, dst: Path) -> None:
    (dst / ".glm4moe").mkdir(parents=True)
    (dst / ".glm4moe" / "job.json").write_text("{}")
    with pytest.raises(UsageError, match="other files in it"):
        download()


def test_damage_with_the_time_kept_is_found_and_repaired(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    """What `hf download` trusts: size and modification time."""
    download()
    path = dst / SHARD
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (dst / "LICENSE").write_bytes(b"short")
    served = dict(hub.served)
    done = download()
    assert sorted(finding.subject for finding in done.damaged) == ["LICENSE", SHARD]
    assert done.num_bytes == len(checkpoint_files[SHARD]) + len(checkpoint_files["LICENSE"])
    assert read_folder(dst) == checkpoint_files
    assert {path for path in served if hub.served[path] > served[path]} == {SHARD, "LICENSE"}
    kept = {path.name: path.read_bytes() for path in (dst / ".glm4moe" / "quarantine").iterdir()}
    assert kept == {f"{SHARD}.{sha256(bytes(data))[:8]}": bytes(data), "LICENSE.5": b"short"}


def test_complete_folder_needs_no_request(hub: FakeHub, download: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    download()
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download().num_bytes == 0
    assert download(revision="main").num_bytes == 0
    assert hub.requests == []


def test_incomplete_folder_offline_names_what_is_missing(
    hub: FakeHub, download: Download, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download()
    (dst / SHARD).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as raised:
        download()
    assert str(raised.value) == (
        f"DST {dst}: expected all 8 files, as HF_HUB_OFFLINE is set, found 1 missing: {SHARD}. "
        "Unset HF_HUB_OFFLINE to fetch them."
    )


def test_selection_may_grow(hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]) -> None:
    download(include=("*.json",), exclude=("generation*",))
    assert set(read_folder(dst)) == {"config.json", "model.safetensors.index.json"}
    download()
    assert read_folder(dst) == checkpoint_files


@pytest.mark.parametrize("damage", ["bytes", "record", "shorter", "gone"])
def test_damaged_partial_costs_a_second_fetch_and_no_error(
    hub: FakeHub,
    download: Download,
    dst: Path,
    checkpoint_files: dict[str, bytes],
    damage: str,
) -> None:
    hub.fail(SHARD, Fault(cut=70_000), *[Fault(cut=0)] * 6)
    with pytest.raises(NetworkError):
        download()
    (path,) = (dst / ".glm4moe" / "partial").glob(f"{SHARD}.*.partial")
    if damage == "bytes":
        with path.open("r+b") as file:
            file.write(b"damaged")
    elif damage == "record":
        path.with_suffix(".offset").write_bytes(b"\x00" * 40)
    elif damage == "shorter":
        os.truncate(path, 10)
    else:
        path.unlink()
    download()
    assert read_folder(dst) == checkpoint_files
    assert hub.asked(SHARD)[-1] == ""


def test_partial_of_other_content_is_not_continued(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    """The record says whose bytes they are; a listing may be replaced by hand, or by another version."""
    hub.fail(SHARD, Fault(cut=70_000), *[Fault(cut=0)] * 6)
    with pytest.raises(NetworkError):
        download()
    (record,) = (dst / ".glm4moe" / "partial").glob(f"{SHARD}.*.offset")
    record.write_text(f"{'0' * 64} {70_000:020}\n")
    download()
    assert hub.asked(SHARD)[-1] == ""
    assert read_folder(dst) == checkpoint_files


def test_record_is_written_after_the_bytes_are_synced(
    hub: FakeHub, download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other order would, after a power loss, take zeros for the file's bytes."""
    events: list[str] = []
    sync, write = os.fsync, partial.PartialFile._write_record
    monkeypatch.setattr("os.fsync", lambda fd: (events.append("sync"), sync(fd)))
    monkeypatch.setattr(partial, "SYNC_BYTES", 10_000)
    monkeypatch.setattr(
        partial.PartialFile, "_write_record", lambda self, offset: (events.append("record"), write(self, offset))
    )
    download(num_workers=1, include=(SHARD,))
    assert len(events) >= 6
    # the listing before, the folder after the file got its name
    first, last = events.index("record") - 1, len(events) - 1 - events[::-1].index("record")
    assert events[first : last + 2] == ["sync", "record", "sync"] * ((last + 2 - first) // 3)


def test_jobs_stop_when_one_fails() -> None:
    seen: list[int] = []

    def work(item: int, stop: threading.Event) -> None:
        seen.append(item)
        if item == 3:
            raise InputError("three")
        # those beside it end when they are told to
        assert item < 3 or stop.wait(PATIENCE_SECONDS)

    with pytest.raises(InputError, match="three"):
        run_jobs(range(1000), work, 2)
    assert set(seen) <= {0, 1, 2, 3, 4}
    run_jobs([], work, 2)


def test_jobs_stop_where_the_last_thread_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it went on after the run had ended."""
    told, asked = threading.Event(), []

    def refuse_second() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise MemoryError

    def work(_: int, stop: threading.Event) -> None:
        if stop.wait(PATIENCE_SECONDS):
            told.set()

    monkeypatch.setattr("converters.hub.pool.check_room", refuse_second)
    with pytest.raises(MemoryError):
        run_jobs(range(2), work, 2)
    assert told.is_set()
