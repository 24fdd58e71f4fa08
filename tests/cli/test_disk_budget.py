"""--disk-budget: a hub id as SRC, never there as a whole; the result is that of download and convert, byte for byte."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import small_checkpoint
from fake_hub import REPO, FakeHub, Fault, serving, sha256
from quantizing import statistics

from converters import job, pipeline
from converters.checkpoint.lock import locked
from converters.checkpoint.writer import ShardWriter
from converters.feed import Feed
from converters.hub.fetch import Fetcher
from tests.cli.conftest import Ended

Program = Callable[..., Ended]
PACKED = ("convert", "--layout", "packed")
FP8 = ("quantize", "--scheme", "fp8")
FUSED = ("convert", "--layout", "fused", "--mtp", "separate")
# weights of several files share a scale; and a file of its own is written
NVFP4 = ("quantize", "--scheme", "attention=nvfp4-weight-only", "--format", "modelopt", "--mtp", "quantize")
ARGS = ("--max-shard-size", "40kB", "-q", "--workers", "2")
ROOMY = "100MB"
NUM_SHARDS = 8


def shard(number: int) -> str:
    return f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("repo") / "small", num_shards=NUM_SHARDS)


@pytest.fixture(scope="module")
def files(origin: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(origin.iterdir())}
    beside = {"empty.txt": b"", "assets/picture.png": b"1", "code.py": b"1", "weights.BIN": b"2", "old.bin": b"3"}
    card = b"---\nlicense: mit\n---\n# What it was made from\n"
    return {**found, **beside, "README.md": card, "tokenizer.json": b"{}" * 5000}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(files, monkeypatch) as fake:
        yield fake


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "dst"


def words(command: tuple[str, ...], src: object, dst: Path, *more: str) -> list[str]:
    name, *options = command
    return [name, str(src), str(dst), *options, *ARGS, *more]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def expected(hub: FakeHub, program: Program, tmp_path: Path) -> Callable[[tuple[str, ...]], dict[str, str]]:
    """Digests of what download and the command give."""

    def run(command: tuple[str, ...]) -> dict[str, str]:
        whole, made = tmp_path / "whole", tmp_path / "made"
        assert program("download", REPO, str(whole), "-q").exit_code == 0
        assert program(*words(command, whole, made)).exit_code == 0
        hub.served.clear()
        return digests(made)

    return run


def least_budget(program: Program, command: tuple[str, ...], tmp_path: Path) -> int:
    ended = program(*words(command, REPO, tmp_path / "none", "--disk-budget", ROOMY, "--dry-run", "--json"))
    assert not (tmp_path / "none").exists()
    return int(json.loads(ended.stdout)["result"]["staging"]["least_bytes"])


def held(dst: Path) -> int:
    """Return the disk space that is taken for the source, quarantine aside."""
    total = 0
    for folder, _, names in os.walk(dst / ".glm4moe" / "source"):
        for path in (Path(folder), *(Path(folder) / name for name in names)):
            try:
                total += path.stat().st_blocks * 512 if "quarantine" not in path.parts else 0
            except FileNotFoundError:  # removed meanwhile
                continue
    return total


@pytest.fixture
def samples(dst: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Space taken for the source around every fetch, every removal, and every shard's publishing."""
    taken: list[int] = []

    def around(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def sampled(self: Any, *args: Any) -> Any:
            taken.append(held(dst))
            result = original(self, *args)
            taken.append(held(dst))
            return result

        monkeypatch.setattr(owner, name, sampled)

    around(Fetcher, "fetch")
    around(Fetcher, "_receive")
    around(Feed, "after")
    around(ShardWriter, "finish")
    return taken


@pytest.mark.parametrize("command", [PACKED, FP8, FUSED, NVFP4], ids=["packed", "fp8", "fused", "nvfp4"])
@pytest.mark.parametrize("spare", [0, 60_000, 10_000_000])
def test_result_is_that_of_download_and_convert_and_the_budget_is_kept(
    program: Program,
    dst: Path,
    tmp_path: Path,
    files: dict[str, bytes],
    hub: FakeHub,
    expected: Callable[..., dict[str, str]],
    samples: list[int],
    command: tuple[str, ...],
    spare: int,
) -> None:
    whole = expected(command)
    budget = least_budget(program, command, tmp_path) + spare
    hub.served.clear()
    samples.clear()
    ended = program(*words(command, REPO, dst, "--disk-budget", str(budget), "--json"))
    assert ended.exit_code == 0, ended.stderr
    assert digests(dst) == whole
    weights = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    assert 0 < max(samples) <= budget
    result = json.loads(ended.stdout)["result"]
    assert (result["source"], result["staging"]["fetch_bytes"]) == (f"{REPO}@{hub.commit}", weights)
    # each file once, beside its header
    for number in range(1, NUM_SHARDS + 1):
        size = len(files[shard(number)])
        assert size < hub.served[shard(number)] < size + 20_000
    assert hub.served["old.bin"] == hub.served["weights.BIN"] == hub.served["code.py"] == 0


class Meeting:
    """Stands for the hub's event: what waits for it goes on once so many do."""

    def __init__(self, parties: int) -> None:
        self.barrier = threading.Barrier(parties, timeout=60)
        self.has_met = False

    def wait(self) -> None:
        if not self.has_met:
            self.barrier.wait()
            self.has_met = True

    def set(self) -> None: ...


def test_statistics_are_held_against_the_model_with_few_requests_at_once(
    program: Program,
    hub: FakeHub,
    origin: Path,
    dst: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There was one request after another, for each norm, router and attention weight."""
    stats = tmp_path / "stats.json"
    statistics(origin).save(stats)
    command = ("quantize", "--scheme", "fp8-static", "--stats", str(stats))
    whole = expected(command)
    hub.requests.clear()
    shards = [shard(number) for number in range(1, NUM_SHARDS + 1)]
    # to read the length and the rest of each header; then the first samples of two files wait for each other
    for name in shards[:2]:
        hub.fail(name, Fault(), Fault(), Fault(hold=-1))
    meeting = Meeting(2)
    monkeypatch.setattr(hub, "go", meeting)
    # on a busy machine the second request may take longer than the five seconds of other tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 90)
    ended = program(*words(command, REPO, dst, "--disk-budget", ROOMY))
    assert (ended.exit_code, digests(dst) == whole, meeting.has_met) == (0, True, True), ended.stderr
    # and the file itself; some have nothing that is sampled
    assert {len(hub.asked(name)) for name in shards} == {3, 4}


def test_fetching_shows_in_the_progress_and_time_is_not_made_up(
    program: Program, hub: FakeHub, dst: Path, files: dict[str, bytes]
) -> None:
    args = [word for word in words(FP8, REPO, dst, "--disk-budget", ROOMY) if word != "-q"]
    ended = program(*args)
    assert ended.exit_code == 0, ended.stderr
    assert "time\tnot known: the network decides, and no weights are here to measure the rest on\n" in ended.stdout
    unused = (".py", ".bin", ".BIN", "config.json", "index.json", ".png")
    total = sum(len(files[name]) for name in files if not name.endswith(unused) or name == "generation_config.json")
    last = [line for line in ended.stderr.splitlines() if line.startswith("step=quantize")][-1]
    # weights and the files around them, in what came in as in what there is
    assert last.endswith(f", fetched {total / 1000:.1f}kB of {total / 1000:.1f}kB")


def test_little_is_held_of_a_source_that_is_converted_in_its_order(program: Program, hub: FakeHub) -> None:
    ended = program("quantize", REPO, "x", "--scheme", "fp8", *ARGS, "--disk-budget", ROOMY, "--dry-run", "--json")
    staging = json.loads(ended.stdout)["result"]["staging"]
    assert staging["files"] == [shard(number) for number in range(1, NUM_SHARDS + 1)]
    assert staging["least_bytes"] < staging["peak_bytes"] < 100_000_000


def test_too_small_a_budget_is_refused_with_the_least_one(
    program: Program, hub: FakeHub, dst: Path, tmp_path: Path
) -> None:
    least = least_budget(program, FP8, tmp_path)
    hub.served.clear()
    ended = program(*words(FP8, REPO, dst, "--disk-budget", str(least - 1)))
    assert ended.exit_code == 5
    assert f"--disk-budget: expected at least {least} bytes, found {least - 1}. " in ended.stderr
    assert sum(hub.served[shard(number)] for number in range(1, NUM_SHARDS + 1)) < 8 * 8_000
    assert not dst.exists()


@pytest.mark.parametrize(
    ("src", "more", "message"),
    [
        (REPO, (), "nothing whole in the cache, and no --disk-budget."),
        (REPO, ("--disk-budget", ROOMY, "--part", "1/2"), "--disk-budget: expected no --part beside it, found both."),
        (REPO, ("--disk-budget", ROOMY, "--update"), "--disk-budget: expected no --update beside it, found both."),
        (REPO, ("--disk-budget", ROOMY, "--finalize"), "--disk-budget: expected no --finalize beside it, found both."),
        (".", ("--disk-budget", ROOMY), "--disk-budget: expected a hub id such as org/name as SRC, found the folder "),
        ("absent", ("--disk-budget", ROOMY), "Directory 'absent' does not exist."),
    ],
)  # fmt: skip
def test_refusals_by_name(
    program: Program, hub: FakeHub, dst: Path, src: str, more: tuple[str, ...], message: str
) -> None:
    ended = program(*words(FP8, src, dst, *more))
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert not hub.requests
    assert not dst.exists()


def test_local_folder_of_that_name_wins(
    program: Program, origin: Path, dst: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / REPO).symlink_to(origin)
    monkeypatch.chdir(tmp_path)
    assert program(*words(FP8, REPO, dst)).exit_code == 0


@pytest.mark.parametrize("where", ["fetch", "publish", "journal", "release", "commit"])
def test_stopped_anywhere_it_goes_on(
    program: Program,
    hub: FakeHub,
    dst: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, str]],
    samples: list[int],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    whole, budget = expected(FP8), least_budget(program, FP8, tmp_path) + 50_000
    owner, name, calls = {
        "fetch": (Fetcher, "_receive", 6),
        "publish": (ShardWriter, "finish", 3),
        "journal": (job, "append_journal", 2),
        "release": (Feed, "after", 3),
        "commit": (job, "write_manifest", 1),
    }[where]
    original, count = getattr(owner, name), 0

    def stopping(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        assert program(*words(FP8, REPO, dst, "--disk-budget", str(budget))).exit_code == 130
    assert not (dst / "config.json").exists() or where == "commit"
    commit = hub.commit
    hub.push("main", {"config.json": b"{}"})
    ended = program(*words(FP8, REPO, dst, "--disk-budget", str(budget), "--json"))
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["result"]["source"] == f"{REPO}@{commit}"
    assert digests(dst) == whole
    assert max(samples) <= budget


def test_interrupted_while_it_waits_for_the_network(
    program: Program, hub: FakeHub, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # headers take two requests each; the whole file is the third
    hub.fail(shard(5), Fault(), Fault(), Fault(hold=11_000, piece=1000))
    command = [sys.executable, "-m", "glm4moe_cli", *words(FP8, REPO, dst, "--disk-budget", ROOMY)]
    process = subprocess.Popen(command, env=patient(hub), stderr=subprocess.PIPE)
    wait_for(process, lambda: hub.served[shard(5)] > 10_000 and len(list(dst.glob("*.safetensors"))) > 0)
    process.send_signal(signal.SIGINT)
    # the hub sends nothing more before this is over
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr


@pytest.mark.parametrize("slow", [4, 6])
def test_killed_it_goes_on(
    program: Program,
    hub: FakeHub,
    dst: Path,
    tmp_path: Path,
    files: dict[str, bytes],
    expected: Callable[..., dict[str, str]],
    samples: list[int],
    slow: int,
) -> None:
    whole, budget = expected(FP8), least_budget(program, FP8, tmp_path) + 120_000
    hub.fail(shard(slow), Fault(), Fault(), Fault(hold=18_000, piece=3000))
    command = [sys.executable, "-m", "glm4moe_cli", *words(FP8, REPO, dst, "--disk-budget", str(budget))]
    process = subprocess.Popen(command, env=patient(hub))
    wait_for(process, lambda: len(list(dst.glob("model*.safetensors"))) > 0 and hub.served[shard(slow)] > 15_000)
    process.kill()
    process.wait()
    assert 0 < held(dst) <= budget
    hub.served.clear()
    ended = program(*words(FP8, REPO, dst, "--disk-budget", str(budget), "--json"))
    assert ended.exit_code == 0, ended.stderr
    assert digests(dst) == whole
    assert json.loads(ended.stdout)["result"]["outcome"]["kept"]
    assert hub.served[shard(1)] < len(files[shard(1)])
    assert max(samples) <= budget


def patient(hub: FakeHub) -> dict[str, str]:
    """Return an environment in which a hub that stands still is waited for."""
    return {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "300"}


def wait_for(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the process ended with {process.wait()}, or what was waited for did not happen")
        time.sleep(0.02)


def test_wrong_bytes_finish_nothing_and_a_repaired_hub_completes(
    program: Program, hub: FakeHub, dst: Path, files: dict[str, bytes], expected: Callable[..., dict[str, str]]
) -> None:
    whole, wrong = expected(PACKED), bytes(len(files[shard(4)]))
    hub.fail(shard(4), Fault(), Fault(), Fault(body=wrong))
    ended = program(*words(PACKED, REPO, dst, "--disk-budget", ROOMY))
    kept = dst / ".glm4moe/source/.glm4moe/quarantine" / f"{shard(4)}.{sha256(wrong)[:8]}"
    assert ended.exit_code == 4
    assert f"{REPO}: {shard(4)}: expected sha256 {sha256(files[shard(4)])}, found {sha256(wrong)}." in ended.stderr
    assert kept.read_bytes() == wrong
    assert not (dst / "config.json").exists()
    assert program(*words(PACKED, REPO, dst, "--disk-budget", ROOMY)).exit_code == 0
    assert digests(dst) == whole


def test_wrong_header_is_found_by_the_whole_file(
    program: Program, hub: FakeHub, dst: Path, files: dict[str, bytes]
) -> None:
    # two tensors of one shape exchange their names: a header that passes every check
    data = files[shard(3)]
    length = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:length])
    first, second = next(
        (a, b)
        for a in table
        for b in table
        if a < b and a != "__metadata__" and b != "__metadata__"
        and all(table[a][key] == table[b][key] for key in ("shape", "dtype"))
    )  # fmt: skip
    table[first], table[second] = table[second], table[first]
    swapped = json.dumps(table, separators=(",", ":")).encode()
    body = data[:8] + swapped.ljust(length - 8) + data[length:]
    assert len(body) == len(data)
    hub.fail(shard(3), Fault(), Fault(body=body))
    ended = program(*words(FP8, REPO, dst, "--disk-budget", ROOMY))
    assert ended.exit_code == 4
    assert f"{shard(3)} at byte 0: expected the bytes that the hub sent when the plan was made" in ended.stderr
    assert not (dst / "config.json").exists()


def test_gated_is_told_as_download_does_and_leaves_nothing(program: Program, hub: FakeHub, dst: Path) -> None:
    hub.gated = True
    ended = program(*words(FP8, REPO, dst, "--disk-budget", ROOMY))
    assert ended.exit_code == 7
    assert "expected access to a gated repository, found none for no token. Accept its terms at" in ended.stderr
    assert not dst.exists()


def test_pickled_weights_alone_are_refused(program: Program, hub: FakeHub, dst: Path) -> None:
    hub.push("main", {"config.json": b"{}", "pytorch_model.bin": b"1"})
    assert program(*words(FP8, REPO, dst, "--disk-budget", ROOMY)).exit_code == 8
    assert not dst.exists()


def test_second_run_at_the_same_time_is_refused(program: Program, hub: FakeHub, dst: Path) -> None:
    with locked(dst / ".glm4moe" / "source"):
        ended = program(*words(FP8, REPO, dst, "--disk-budget", ROOMY))
    assert (ended.exit_code, "expected no other run in it" in ended.stderr) == (6, True)


def test_folder_with_other_files_is_left_alone(program: Program, hub: FakeHub, dst: Path) -> None:
    dst.mkdir()
    (dst / "mine").write_text("mine")
    assert program(*words(FP8, REPO, dst, "--disk-budget", ROOMY)).exit_code == 2
    assert [path.name for path in dst.iterdir()] == ["mine"]


def test_finished_folder_is_recognised_and_another_job_refused(program: Program, hub: FakeHub, dst: Path) -> None:
    assert program(*words(FP8, REPO, dst, "--disk-budget", ROOMY)).exit_code == 0
    before = digests(dst)
    ended = program(*words(FP8, REPO, dst, "--disk-budget", ROOMY, "--json"))
    assert json.loads(ended.stdout)["result"]["outcome"]["already_finished"]
    assert program(*words(PACKED, REPO, dst, "--disk-budget", ROOMY)).exit_code == 2
    assert digests(dst) == before


def stop_at_third_shard(program: Program, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_shard(3, program, args, monkeypatch, lambda: True)


def stop_at_shard(
    number: int,
    program: Program,
    args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    condition: Callable[[], bool],
) -> None:
    """Interrupt when this shard would get its name, once the condition holds."""
    original, count = ShardWriter.finish, 0

    def finish(self: ShardWriter) -> None:
        nonlocal count
        count += 1
        if count == number:
            deadline = time.monotonic() + 300
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish)
        assert program(*args).exit_code == 130


def test_restart_takes_the_commit_of_now(
    program: Program, hub: FakeHub, dst: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgeted = words(FP8, REPO, dst, "--disk-budget", ROOMY)
    stop_at_third_shard(program, budgeted, monkeypatch)
    commit = hub.push("main", {**files, "LICENSE": b"another licence"})
    ended = program(*words(FP8, f"{REPO}@{commit}", dst, "--disk-budget", ROOMY))
    assert (ended.exit_code, "which it was begun with" in ended.stderr) == (2, True)
    assert program(*budgeted, "--restart").exit_code == 0
    assert (dst / "LICENSE").read_bytes() == b"another licence"


def test_begun_from_the_hub_and_finished_from_a_folder(
    program: Program,
    hub: FakeHub,
    dst: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = expected(FP8)
    stop_at_third_shard(program, words(FP8, REPO, dst, "--disk-budget", ROOMY), monkeypatch)
    assert program(*words(FP8, tmp_path / "whole", dst)).exit_code == 0
    assert digests(dst) == whole


def test_begun_from_a_folder_is_not_finished_from_the_hub(
    program: Program, hub: FakeHub, origin: Path, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_third_shard(program, words(FP8, origin, dst), monkeypatch)
    ended = program(*words(FP8, REPO, dst, "--disk-budget", ROOMY))
    assert (ended.exit_code, f"source file {shard(1)}: expected " in ended.stderr) == (4, True)


def test_smaller_budget_on_resume_is_kept_too(
    program: Program,
    hub: FakeHub,
    dst: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, str]],
    samples: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, least = expected(FP8), least_budget(program, FP8, tmp_path)
    args = words(FP8, REPO, dst, "--disk-budget", ROOMY)
    stop_at_shard(1, program, args, monkeypatch, lambda: held(dst) > least)
    assert held(dst) > least
    fetches = len(samples)
    assert program(*words(FP8, REPO, dst, "--disk-budget", str(least))).exit_code == 0
    assert digests(dst) == whole
    assert max(samples[fetches + 1 :]) <= least


def test_damaged_output_is_made_again_within_the_budget(
    program: Program,
    hub: FakeHub,
    dst: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, str]],
    samples: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, budget = expected(FP8), least_budget(program, FP8, tmp_path) + 100_000
    stop_at_third_shard(program, words(FP8, REPO, dst, "--disk-budget", str(budget)), monkeypatch)
    first = min(dst.glob("model*.safetensors"))
    first.write_bytes(bytes(first.stat().st_size))
    assert program(*words(FP8, REPO, dst, "--disk-budget", str(budget))).exit_code == 0
    assert digests(dst) == whole
    assert max(samples) <= budget


def test_source_goes_only_after_the_journal(
    program: Program, hub: FakeHub, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Feed.after

    def after(self: Feed, file: str) -> None:
        journal = (dst / ".glm4moe/journal.jsonl").read_bytes()
        assert f'"{file}"'.encode() in journal
        assert (dst / file).exists()
        original(self, file)

    monkeypatch.setattr(Feed, "after", after)
    assert program(*words(PACKED, REPO, dst, "--disk-budget", ROOMY)).exit_code == 0
    assert not (dst / ".glm4moe").exists()


def test_failing_worker_ends_the_run(
    program: Program, hub: FakeHub, dst: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = least_budget(program, FP8, tmp_path)
    original, count = pipeline._make_unit, 0

    def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(pipeline, "_make_unit", failing)
    assert program(*words(FP8, REPO, dst, "--disk-budget", str(budget))).exit_code == 5
