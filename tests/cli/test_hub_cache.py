"""A hub id in the hub's cache: used as it lies there where it is whole, and nobody is asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub, serving, sha256

from tests.cli.conftest import Ended

Program = Callable[..., Ended]
FP8 = ("--scheme", "fp8", "-q", "--workers", "1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving({}, monkeypatch) as fake:
        yield fake


@pytest.fixture
def snapshot(small: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint as the library lays it out: links from the snapshot of a commit to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    folder = repo / "snapshots" / hub.commit
    for made in (folder, repo / "refs", repo / "blobs"):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text(hub.commit)
    for path in small.iterdir():
        blob = repo / "blobs" / sha256(path.read_bytes())
        blob.write_bytes(path.read_bytes())
        (folder / path.name).symlink_to(Path("../../blobs") / blob.name)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("revision", ["", "@main", "@COMMIT"])
def test_conversion_reads_it_there(
    program: Program, small: Path, snapshot: Path, hub: FakeHub, tmp_path: Path, revision: str
) -> None:
    src = REPO + revision.replace("COMMIT", hub.commit)
    assert program("quantize", str(small), str(tmp_path / "a"), *FP8).exit_code == 0
    assert program("quantize", src, str(tmp_path / "b"), *FP8).exit_code == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert hub.requests == []


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00002.safetensors", "all", "revision"])
def test_what_is_not_whole_is_refused_with_the_ways_to_get_it(
    program: Program, snapshot: Path, hub: FakeHub, tmp_path: Path, lost: str
) -> None:
    for path in snapshot.iterdir():
        if lost in (path.name, "all"):
            path.unlink()
    src = f"{REPO}@v2" if lost == "revision" else REPO
    ended = program("quantize", src, str(tmp_path / "dst"), *FP8)
    assert ended.exit_code == 2
    assert ended.stderr == (
        f"Error: SRC {REPO}: expected a folder, a checkpoint that is whole in the hub's cache, or --disk-budget beside "
        "a hub id, found no such folder, nothing whole in the cache, and no --disk-budget. "
        f"Run 'glm4moe download {REPO} FOLDER' first, or add --disk-budget SIZE.\n"
    )
    assert hub.requests == []
    assert not (tmp_path / "dst").exists()


def test_inspect_offline_looks_into_the_cache(
    program: Program, small: Path, snapshot: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here, there = program("inspect", str(small)), program("inspect", REPO)
    assert (here.exit_code, there.exit_code) == (0, 0)
    assert here.stdout == there.stdout.replace(REPO, str(small))
    assert hub.requests == []


def test_inspect_offline_without_it_says_so(
    program: Program, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    ended = program("inspect", REPO)
    assert (ended.exit_code, ended.stderr) == (
        7,
        f"Error: CKPT {REPO}: expected a folder, or a hub id that is whole in the hub's cache, as HF_HUB_OFFLINE is "
        "set, found neither. Unset HF_HUB_OFFLINE to look at it on the hub.\n",
    )
    assert hub.requests == []
