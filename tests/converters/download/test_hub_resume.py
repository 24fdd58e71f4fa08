"""Stopping and going on: kill -9, signals, two processes, a branch that moves, damage between runs, no network."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub, Fault, read_folder, sha256

from converters.checkpoint.journal import locked
from converters.errors import InputError, LockedError, NetworkError, UsageError
from converters.hub import partial
from converters.hub.pool import run_jobs

ROOT = Path(__file__).parents[3]
SHARD = "model-00001-of-00002.safetensors"
STEP = 1 << 20
BIG_BYTES = 24 << 20
# what a server may have sent that the client had not read yet when it died
UNDER_WAY = 3 << 20
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
    return {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": "/nonexistent", "NO_PROXY": "127.0.0.1"}


def start(hub: FakeHub, dst: Path) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(dst), cwd=ROOT, env=environment(hub), text=True, **pipes)


def wait_for_bytes(hub: FakeHub, num_bytes: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while hub.served["big.safetensors"] < num_bytes:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_9_loses_no_more_than_a_step(big_hub: FakeHub, big_file: bytes, tmp_path: Path) -> None:
    """Killed twice in the middle of a file; the server's count of bytes is what is judged, not ours."""
    dst = tmp_path / "dst"
    sent = 0
    for part in (1, 2):
        big_hub.fail("big.safetensors", Fault(pause=0.003, piece=64 << 10))
        process = start(big_hub, dst)
        wait_for_bytes(big_hub, sent + BIG_BYTES // 3, process)
        process.kill()
        process.communicate()
        sent = big_hub.served["big.safetensors"]
        assert sent < BIG_BYTES + part * (STEP + UNDER_WAY)
        assert not (dst / "big.safetensors").exists()
        assert not (dst / "config.json").exists()
        big_hub.faults.clear()
    process = start(big_hub, dst)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert (dst / "big.safetensors").read_bytes() == big_file
    lost = big_hub.served["big.safetensors"] - BIG_BYTES
    assert lost <= 2 * (STEP + UNDER_WAY)
    assert f"Going on with commit {big_hub.commit}" in stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signal_stops_at_once_and_loses_nothing_that_was_read(
    big_hub: FakeHub, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    dst = tmp_path / "dst"
    big_hub.fail("big.safetensors", Fault(pause=0.003, piece=64 << 10))
    process = start(big_hub, dst)
    wait_for_bytes(big_hub, BIG_BYTES // 3, process)
    before = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - before < 5
    assert process.returncode == code
    assert stderr.splitlines()[-1].endswith("Run the same command again to go on from here.")
    (file,) = (dst / ".glm4moe" / "partial").glob("big*.offset")
    assert int(file.read_text().split()[1]) > BIG_BYTES // 3 - UNDER_WAY


def test_signal_does_not_wait_for_a_silent_server(big_hub: FakeHub, tmp_path: Path) -> None:
    """Threads in a read cannot be woken; they are left behind."""
    big_hub.fail("big.safetensors", Fault(silence=8))
    process = start(big_hub, tmp_path / "dst")
    while not big_hub.asked("big.safetensors"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    before = time.monotonic()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert time.monotonic() - before < 6


def test_second_run_into_the_same_folder_is_refused(hub: FakeHub, download: Download, dst: Path) -> None:
    with locked(dst):
        with pytest.raises(LockedError) as raised:
            download()
        assert raised.value.found.startswith(f"process {os.getpid()} on ")
    download()


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
    path = dst / ".glm4moe" / "partial" / f"{SHARD}.partial"
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
    record = dst / ".glm4moe" / "partial" / f"{SHARD}.offset"
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
        assert stop.wait(0.01) in (True, False)

    with pytest.raises(InputError, match="three"):
        run_jobs(range(1000), work, 2)
    assert len(seen) < 10
    run_jobs([], work, 2)
