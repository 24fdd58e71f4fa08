"""`glm4moe download` through its real entry: exact sentences, exit codes, JSON, files on disk."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import small_checkpoint
from fake_hub import REPO, FakeHub, Fault, read_folder, serving, sha256

from tests.cli.conftest import Ended

Program = Callable[..., Ended]
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = small_checkpoint(tmp_path_factory.mktemp("repo") / "small")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(files, monkeypatch) as fake:
        yield fake


@pytest.fixture
def dst(tmp_path: Path) -> str:
    return str(tmp_path / "dst")


def free_line(stdout: str) -> str:
    """Return the figure that no test can know."""
    return stdout.split(" needed, ")[1].split(" free")[0]


def test_plan_result_and_hint(hub: FakeHub, program: Program, dst: str, files: dict[str, bytes]) -> None:
    ended = program("download", REPO, dst, "--workers", "1")
    assert ended.exit_code == 0
    assert ended.stdout.splitlines() == [
        f"repository\t{REPO}",
        f"commit\t{hub.commit} (main)",
        "files\t284.0kB in 6 files",
        "there\t0B, to be hashed again",
        "to fetch\t284.0kB",
        f"disk\t284.0kB needed, {free_line(ended.stdout)} free",
        f"folder\t{dst}",
        f"commit\t{hub.commit}",
        "files\t6",
        "fetched\t284.0kB",
        "proved\t284.0kB",
    ]
    assert ended.stderr.splitlines()[-1] == f"Hint: glm4moe quantize {dst} {dst}-FP8 --scheme fp8"
    assert "step=download done=284.0kB/284.0kB" in ended.stderr
    assert read_folder(Path(dst)) == files


def test_dry_run_plans_the_bytes_later_fetched_and_writes_nothing(
    hub: FakeHub, program: Program, dst: str, files: dict[str, bytes]
) -> None:
    ended = program("download", REPO, dst, "--dry-run", "--json")
    planned = json.loads(ended.stdout)["result"]
    assert (ended.exit_code, planned["dry_run"], Path(dst).exists()) == (0, True, False)
    assert len(hub.requests) == 1
    written = json.loads(program("download", REPO, dst, "--json").stdout)
    plan = planned["plan"]
    assert {file["path"]: file["size"] for file in plan["files"]} == {path: len(files[path]) for path in files}
    assert plan["fetch_bytes"] == plan["needed_bytes"] == sum(map(len, files.values()))
    assert written["result"]["fetched_bytes"] == written["bytes"]["download"] == plan["fetch_bytes"]
    assert {name: written["result"][name] for name in ("repo", "revision", "commit", "destination")} == {
        "repo": REPO,
        "revision": "main",
        "commit": hub.commit,
        "destination": dst,
    }


def test_resume_says_what_is_there_and_at_which_commit(
    hub: FakeHub, program: Program, dst: str, files: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(cut=70_000), *[Fault(cut=0)] * 6)
    assert program("download", REPO, dst, "--workers", "1").exit_code == 7
    before = sum(len(data) for path, data in files.items() if (Path(dst) / path).exists())
    hub.push("main", {**files, "LICENSE": b"moved"})
    ended = program("download", REPO, dst, "--json", "--workers", "1")
    document = json.loads(ended.stdout)
    assert ended.exit_code == 0
    assert f"Going on with commit {document['result']['commit']}, which {dst} was begun with.\n" in ended.stderr
    total = sum(map(len, files.values()))
    held = before + 70_000 + len(files["config.json"]) + len(files["model.safetensors.index.json"])
    plan = document["result"]["plan"]
    assert (plan["resumed"], plan["present_bytes"], plan["fetch_bytes"]) == (True, held, total - held)
    assert document["bytes"] == {"check": before, "download": total - held}


def test_gated(hub: FakeHub, program: Program, dst: str) -> None:
    hub.gated = True
    ended = program("download", REPO, dst, "--quiet", "--workers", "1")
    assert ended.exit_code == 7
    assert ended.stderr == (
        f"Error: {REPO}: model.safetensors.index.json: expected access to a gated repository, found none for no token. "
        f"Accept its terms at {hub.endpoint}/{REPO}, then set HF_TOKEN or run 'hf auth login'.\n"
    )


def test_wrong_revision(hub: FakeHub, program: Program, dst: str) -> None:
    assert program("download", REPO, dst, "--revision", "v9") == (
        7,
        "",
        f"Error: {REPO} at v9: expected a branch, tag or commit, found none of this name. "
        f"{hub.endpoint}/{REPO}/commits lists them.\n",
    )
    assert not Path(dst).exists()


def test_no_disk_is_found_by_the_plan(
    hub: FakeHub, program: Program, dst: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(map(len, files.values()))
    monkeypatch.setattr("converters.hub.plan.statvfs", lambda _: SimpleNamespace(f_bavail=(total - 1), f_frsize=1))
    for option in ("--quiet", "--dry-run"):
        ended = program("download", REPO, dst, option)
        assert ended.exit_code == 5
        assert ended.stderr.splitlines()[-1] == (
            f"Error: disk of {dst}: expected {total} bytes free, found {total - 1}. "
            "Free space or choose another folder, then run the same command."
        )
        assert not Path(dst).exists()


def test_no_disk_met_on_the_way(hub: FakeHub, program: Program, dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    ended = program("download", REPO, dst, "--quiet", "--workers", "1", "--include", SHARD)
    message = re.sub(r"\.[0-9a-f]{6}\.partial", ".partial", ended.stderr)
    assert (ended.exit_code, message) == (
        5,
        f"Error: {dst}/.glm4moe/partial/{SHARD}.partial: expected room to write, found No space left on device. "
        "Free space or choose another folder, then run the same command.\n",
    )


def test_digest_mismatch(hub: FakeHub, program: Program, dst: str, files: dict[str, bytes]) -> None:
    wrong = bytes(len(files[SHARD]))
    hub.fail(SHARD, Fault(body=wrong))
    ended = program("download", REPO, dst, "--quiet")
    kept = f"{dst}/.glm4moe/quarantine/{SHARD}.{sha256(wrong)[:8]}"
    assert (ended.exit_code, ended.stderr) == (
        4,
        f"Error: {REPO}: {SHARD}: expected sha256 {sha256(files[SHARD])}, found {sha256(wrong)}. "
        f"Nothing of it was used; the wrong bytes are in {kept}. Run the same command to fetch it again.\n",
    )
    assert Path(kept).read_bytes() == wrong


def test_pickled_files_are_left_out_with_a_warning_and_refused_by_name(
    hub: FakeHub, program: Program, dst: str, files: dict[str, bytes]
) -> None:
    hub.push("main", {**files, "training_args.bin": b"\x80\x04", "optimizer.pt": b"\x80\x04"})
    ended = program("download", REPO, dst, "--quiet")
    assert (ended.exit_code, ended.stderr) == (
        0,
        "Warning: Not fetched, because pickled files can run code: training_args.bin, optimizer.pt.\n",
    )
    ended = program("download", REPO, dst, "--include", "training_args.bin")
    assert ended.exit_code == 8
    assert ended.stderr.endswith("Pickled weights can run code and are never fetched.\n")
    assert read_folder(Path(dst)) == files


def test_damage_is_told_and_repaired(hub: FakeHub, program: Program, dst: str, files: dict[str, bytes]) -> None:
    program("download", REPO, dst, "-q")
    (Path(dst) / "LICENSE").write_bytes(b"A licence\n")
    ended = program("download", REPO, dst, "-q", "--json")
    assert ended.exit_code == 0
    assert json.loads(ended.stdout)["result"]["refetched"] == ["LICENSE"]
    assert ended.stderr.startswith("Warning: LICENSE: expected git blob id ")
    assert ended.stderr.endswith(". It is in quarantine now and will be fetched again.\n")
    assert read_folder(Path(dst)) == files


def flip(path: Path) -> None:
    """Flip one bit and keep size and times."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_verify_only_works_offline(
    hub: FakeHub, program: Program, dst: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("download", REPO, dst, "-q")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    ended = program("download", REPO, dst, "--verify-only")
    total = sum(map(len, files.values()))
    assert ended.exit_code == 0
    assert ended.stdout.splitlines() == [
        f"folder\t{dst}",
        f"commit\t{hub.commit} (main)",
        "files\t6",
        f"bytes\t{total}",
    ]
    flip(Path(dst) / SHARD)
    (Path(dst) / "LICENSE").unlink()
    (Path(dst) / "config.json").write_bytes(b"{}")
    (Path(dst) / "mine.txt").write_text("mine")
    ended = program("download", REPO, dst, "--verify-only")
    assert ended.exit_code == 4
    table = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [row[0] for row in table] == ["file", "LICENSE", "config.json", SHARD]
    assert table[1][1:] == ["10 bytes", "no file"]
    assert table[3][1] == f"sha256 {sha256(files[SHARD])}"
    assert ended.stderr.splitlines()[-2:] == [
        "Not in the listing: mine.txt.",
        f"Error: {dst}: expected 6 files as listed, found 3 missing or damaged: LICENSE, config.json, {SHARD}. "
        f"Run 'glm4moe download {REPO} {dst}' to fetch them again.",
    ]
    result = json.loads(program("download", REPO, dst, "--verify-only", "--json").stdout)["result"]
    assert (result["extra"], len(result["findings"])) == (["mine.txt"], 3)
    assert hub.requests == []


def test_verify_only_checks_what_was_wanted_and_what_is_there(hub: FakeHub, program: Program, dst: str) -> None:
    program("download", REPO, dst, "-q")
    program("download", REPO, dst, "-q", "--include", "*.json")
    assert json.loads(program("download", REPO, dst, "--verify-only", "--json").stdout)["result"]["files"] == 6
    (Path(dst) / "LICENSE").unlink()
    assert json.loads(program("download", REPO, dst, "--verify-only", "--json").stdout)["result"]["files"] == 5
    assert program("download", REPO, dst, "--verify-only", "--include", "LICENSE").exit_code == 4


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([REPO, "DST", "--verify-only"], 4, "expected the listing that a download keeps, found none"),
        ([REPO, "DST", "--verify-only", "--dry-run"], 2, "found --verify-only, which writes nothing"),
        ([REPO, "DST", "--include", "*.gguf"], 2, "pattern '*.gguf': expected a file of acme/GLM-small"),
        ([REPO, "DST", "--workers", "0"], 2, "'--workers': 0 is not in the range 1<=x<=64"),
        (["acme/other", "DST"], 7, "acme/other at main: expected a repository at http://127.0.0.1:"),
        ([REPO, "FULL"], 2, "expected an empty or new folder, or one that this command began, found other files"),
    ],
)
def test_request_that_cannot_work_is_refused_and_writes_nothing(
    hub: FakeHub, program: Program, tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    names = {"DST": str(tmp_path / "dst"), "FULL": str(tmp_path / "full")}
    ended = program("download", *[names.get(arg, arg) for arg in args])
    assert ended.exit_code == code
    assert message in ended.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_verify_only_of_another_repository_or_revision_is_refused(hub: FakeHub, program: Program, dst: str) -> None:
    program("download", REPO, dst, "-q")
    for args in (["acme/other", dst], [REPO, dst, "--revision", "v9"]):
        ended = program("download", *args, "--verify-only")
        assert ended.exit_code == 2
        assert f"found {REPO} at main, commit {hub.commit}" in ended.stderr
    assert program("download", REPO, dst, "--verify-only", "--revision", hub.commit).exit_code == 0
