"""A hub id in the hub's cache: used as it lies there where it is whole, and nobody is asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import small_checkpoint, write_byte_tokenizer
from fake_hub import REPO, FakeHub, serving, sha256

from tests.cli.conftest import Ended

Program = Callable[..., Ended]
FP8 = ("--scheme", "fp8", "-q", "--workers", "1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving({}, monkeypatch) as fake:
        yield fake


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of two shards that can be run on text."""
    folder = small_checkpoint(tmp_path / "small", vocab_size=256)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    return str(tmp_path / "text.txt")


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
        f"Run 'glm4moe download {src.replace('@', ' FOLDER --revision ') if '@' in src else src + ' FOLDER'}' first, "
        "or add --disk-budget SIZE.\n"
    )
    assert hub.requests == []
    assert not (tmp_path / "dst").exists()


def test_commands_without_a_budget_do_not_offer_one(program: Program, hub: FakeHub, tmp_path: Path, text: str) -> None:
    for argument, *command in (
        ("CKPT", "calibrate", f"{REPO}@v2", str(tmp_path / "s.json"), "--text", text),
        ("SRC", "shard", f"{REPO}@v2", str(tmp_path / "dst"), "--tp", "2"),
    ):
        ended = program(*command)
        assert ended.exit_code == 2
        assert ended.stderr == (
            f"Error: {argument} {REPO}: expected a folder, or a checkpoint that is whole in the hub's cache, found no "
            f"such folder, and nothing whole in the cache. Run 'glm4moe download {REPO} FOLDER --revision v2' first.\n"
        )
    assert hub.requests == []


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


@pytest.mark.parametrize("option", ["--hash", "--check"])
def test_inspect_reads_the_weights_of_a_cached_hub_id(
    program: Program, small: Path, snapshot: Path, hub: FakeHub, option: str
) -> None:
    here, there = program("inspect", str(small), option), program("inspect", REPO, option)
    assert (here.exit_code, there.exit_code) == (0, 0)
    assert here.stdout == there.stdout.replace(REPO, str(small))
    assert f"{REPO} is in the hub's cache: {snapshot}\n" in there.stderr
    assert hub.requests == []


def test_calibration_runs_it_there(
    program: Program, small: Path, snapshot: Path, hub: FakeHub, tmp_path: Path, text: str
) -> None:
    """It was refused, or not even found: a model that is run must be there, and in the cache it is."""
    how = ("--num-tokens", "60", "--context-length", "32")
    for src, name in ((str(small), "here"), (REPO, "there")):
        ended = program("calibrate", src, str(tmp_path / name), "--text", text, *how, "--device", "cpu", "-q")
        assert (ended.exit_code, ended.stderr) == (0, "")
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    for src, name in ((str(small), "a"), (REPO, "b")):
        options = (
            "--scheme",
            "int8-weight-only",
            "--method",
            "gptq",
            "--calibrate",
            text,
            *how,
            "--workers",
            "1",
            "-q",
        )
        assert program("quantize", src, str(tmp_path / name), *options).exit_code == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert hub.requests == []


@pytest.mark.parametrize(("option", "value"), [("--calibrate", "TEXT"), ("--method", "gptq")])
def test_calibration_of_what_is_fetched_as_it_goes_is_refused_before_the_hub_is_asked(
    program: Program, hub: FakeHub, tmp_path: Path, text: str, option: str, value: str
) -> None:
    more = (option, value.replace("TEXT", text), "--disk-budget", "1GB")
    ended = program("quantize", f"{REPO}@v2", str(tmp_path / "dst"), "--scheme", "nvfp4", *more)
    assert ended.exit_code == 2
    name = "--method gptq" if value == "gptq" else option
    assert ended.stderr == (
        f"Error: {name}: expected a SRC that is there as a whole: the model is run, "
        f"found {REPO} with --disk-budget. "
        f"Run 'glm4moe download {REPO} FOLDER --revision v2' first and quantize FOLDER.\n"
    )
    assert hub.requests == []
    assert not (tmp_path / "dst").exists()
