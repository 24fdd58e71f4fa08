"""A checkpoint on a hub, seen through its headers: what is asked for, and what comes of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import small_checkpoint
from fake_hub import REPO, FakeHub, Fault, serving

from converters.checkpoint.header import read_header
from converters.download import Hub
from converters.errors import InputError, NetworkError, UsageError
from converters.inspect.report import inspect_folder
from converters.remote import HubId, fetch_headers

ID = HubId(REPO, "main")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("repo") / "small")


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
    with serving({**files, "assets/picture.png": b"1", "pytorch_model.bin": b"2"}, monkeypatch) as fake:
        yield fake


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zai-org/GLM-4.5-Air", HubId("zai-org/GLM-4.5-Air", "main")),
        ("zai-org/GLM-4.6@v1.0", HubId("zai-org/GLM-4.6", "v1.0")),
        ("a/b@refs/pr/7", HubId("a/b", "refs/pr/7")),
        ("GLM-4.5", None),
        ("/data/GLM-4.5", None),
        ("./GLM/x", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/b@../x", None),
        ("a/..", None),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected


def test_headers_are_laid_down_and_nothing_else_is_asked_for(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    listing = fetch_headers(Hub(), ID, tmp_path)
    assert listing.commit == hub.commit
    shards = sorted(source.glob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", INDEX, "pytorch_model.bin", *(path.name for path in shards),
    }  # fmt: skip
    for path in shards:
        copy = tmp_path / path.name
        assert copy.stat().st_size == path.stat().st_size
        entries = read_header(copy)
        assert entries == read_header(path)
        begin = entries[0].begin
        assert copy.read_bytes()[:begin] == path.read_bytes()[:begin]
        assert not any(copy.read_bytes()[begin:])
        assert hub.asked(path.name) == ["bytes=0-7", f"bytes=8-{begin - 1}"]
    assert (tmp_path / INDEX).read_bytes() == (source / INDEX).read_bytes()
    # that it is there is a fact; what is in it is nobody's business
    assert (tmp_path / "pytorch_model.bin").read_bytes() == b""
    assert hub.asked("pytorch_model.bin") == hub.asked("assets/picture.png") == hub.asked("LICENSE") == []


def test_what_is_said_of_a_hub_id_is_what_is_said_of_its_folder(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    fetch_headers(Hub(), ID, tmp_path)
    assert inspect_folder(tmp_path, "x").to_json(tensors=True) == inspect_folder(source, "x").to_json(tensors=True)


def test_a_network_that_fails_for_a_while_is_asked_again(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    shard = min(source.glob("*.safetensors")).name
    hub.fail(shard, Fault(status=503))
    fetch_headers(Hub(), ID, tmp_path)
    assert len(hub.asked(shard)) == 3


def test_a_header_longer_than_its_file_is_a_finding(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    shard = min(source.glob("*.safetensors")).name
    hub.push("main", {**files, shard: b"\xff" * 64})
    fetch_headers(Hub(), ID, tmp_path)
    assert hub.asked(shard) == ["bytes=0-7"]
    (finding,) = inspect_folder(tmp_path, "x").fatal
    assert (finding.check.number, finding.subject) == (106, shard)


def test_a_repository_without_config_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("main", {"README.md": b"# data"})
    with pytest.raises(UsageError, match=f"{REPO}: expected a repository with config.json, found none in it"):
        fetch_headers(Hub(), ID, tmp_path)


def test_a_json_file_of_gigabytes_is_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("main", {"config.json": b" " * ((16 << 20) + 1)})
    with pytest.raises(InputError, match="expected at most 16 MB, found 16777217 bytes"):
        fetch_headers(Hub(), ID, tmp_path)
    assert hub.asked("config.json") == []


def test_a_repository_that_is_not_there_is_a_network_error(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(NetworkError):
        fetch_headers(Hub(), HubId("acme/other", "main"), tmp_path)
    with pytest.raises(NetworkError):
        fetch_headers(Hub(), HubId(REPO, "no-such-branch"), tmp_path)
