"""The listing: hostile names and numbers, what is wanted of it, and the one kept on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import REPO, FakeHub, git_blob_id, read_folder, sha256, sibling

from converters.errors import ConfigError, Glm4MoeError, InputError, SecurityError, UsageError
from converters.hub.listing import ListedFile, Listing, check_listing, flat_name, read_listing, select, write_listing

Download = Callable[..., object]
COMMIT = "a" * 40
HOSTILE = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "C:\\x",
    "C:x",
    "a\\b",
    "a//b",
    "./a",
    "a/.",
    "a/",
    "",
    ".",
    "..",
    "a\x00b",
    "a\nb",
    "a\x1b[2Jb",
    "a\u202eb",
    "a\ud800b",
    ".glm4moe/listing.json",
    ".GLM4MOE/lock",
    ".git/config",
    "x" * 5000,
    "\u00e9" * 100,
]


def listing(*paths: str, **changes: Any) -> Listing:
    files = tuple(ListedFile(path, 1, "0" * 64) for path in paths)
    return Listing(**{"repo": REPO, "revision": "main", "commit": COMMIT, "files": files, **changes})


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: repr(path)[:20])
def test_hostile_name_is_refused_and_nothing_written(
    hub: FakeHub, download: Download, tmp_path: Path, path: str
) -> None:
    hub.siblings = [sibling("config.json", b"{}"), sibling("x.safetensors", b"x"), sibling(path, b"evil")]
    with pytest.raises(SecurityError, match=f"the listing of {REPO}") as raised:
        download()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400
    assert not (tmp_path / "dst").exists()
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    "path", ["a b.txt", "a/b/c.json", "..a", "a..b", "%2e%2e%2fx", "\u4f60\u597d.txt", ".gitattributes"]
)
def test_unusual_name_is_fine(hub: FakeHub, download: Download, dst: Path, path: str) -> None:
    hub.push("main", {path: b"content"})
    download(include=("*",))
    assert read_folder(dst) == {path: b"content"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": -1}, "expected a size in bytes, found -1"),
        ({"size": 1 << 60}, "expected a size in bytes, found 1152921504606846976"),
        ({"size": None}, "expected a size and a digest, found none"),
        ({"size": "5"}, "expected a size and a digest, found none"),
        ({"blobId": None}, "expected a size and a digest, found none"),
        ({"blobId": "0" * 39}, "expected a sha256 or a blob id"),
        ({"blobId": "../../etc/passwd"}, "expected a sha256 or a blob id"),
        ({"rfilename": "config.json"}, "expected each name once, found one twice"),
        ({"rfilename": "config.json/x"}, "found 'config.json', a file and a folder"),
    ],
)
def test_impossible_entry_is_refused(hub: FakeHub, download: Download, change: dict[str, Any], message: str) -> None:
    hub.siblings = [sibling("config.json", b"{}"), {**sibling("LICENSE", b"x"), **change}]
    with pytest.raises(InputError) as raised:
        download()
    assert message in str(raised.value)


def test_commit_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="40 hex digits"):
        check_listing(listing("a", commit="../main"))


def test_digests_are_git_s_and_lfs_s() -> None:
    for digest in (sha256(b"content"), git_blob_id(b"content")):
        file = ListedFile("a", 7, digest)
        digester = file.new_hash()
        digester.update(b"content")
        assert digester.hexdigest() == digest
    assert git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_flat_names_differ_for_different_paths() -> None:
    paths = ["a/b", "a%2Fb", "a b", "a+b", "a%20b", "\u00e9"]
    names = {flat_name(path) for path in paths}
    assert len(names) == len(paths)
    assert not any("/" in name for name in names)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["a.json", "m/b.json", "m/c.safetensors"]),
        (["*.json"], [], ["a.json", "m/b.json"]),
        (["m/"], [], ["m/b.json", "m/c.safetensors"]),
        (["m/"], ["*.json"], ["m/c.safetensors"]),
        (["a.json", "m/c*"], [], ["a.json", "m/c.safetensors"]),
    ],
)
def test_patterns_select(include: list[str], exclude: list[str], expected: list[str]) -> None:
    selection = select(
        listing("a.json", "m/b.json", "m/c.safetensors", "d.bin", include=tuple(include), exclude=tuple(exclude))
    )
    assert [file.path for file in selection.files] == expected
    assert selection.skipped == (() if include else ("d.bin",))


@pytest.mark.parametrize(
    ("paths", "changes", "error", "message"),
    [
        (["a.json"], {"include": ("*.jsno",)}, UsageError, "pattern '*.jsno': expected a file of "),
        (["a.json"], {"exclude": ("A*",)}, UsageError, "pattern 'A*': expected a file of "),
        (["a.json"], {"exclude": ("*",)}, UsageError, "expected patterns that leave a file"),
        (["a.json", "b.bin"], {}, SecurityError, "expected safetensors, found only b.bin. Pickled weights can run"),
        (["a.json"], {}, InputError, "expected a checkpoint in safetensors, found no such file"),
        (["a.bin"], {"include": ("a.bin",)}, SecurityError, "--include a.bin: expected safetensors"),
        (["a.PT", "c"], {"include": ("*.PT",)}, SecurityError, "--include *.PT: expected safetensors"),
        (["a.bin"], {"include": ("a*",)}, UsageError, "expected patterns that leave a file"),
    ],
)
def test_selection_that_makes_no_sense_is_refused(
    paths: list[str], changes: dict[str, Any], error: type[Glm4MoeError], message: str
) -> None:
    with pytest.raises(error) as raised:
        select(listing(*paths, **changes))
    assert message in str(raised.value)
    assert type(raised.value) is error


def test_kept_listing_reads_back(tmp_path: Path) -> None:
    (tmp_path / ".glm4moe").mkdir()
    assert read_listing(tmp_path) is None
    kept = listing("a", "b/c", include=("*",), exclude=("d",))
    write_listing(tmp_path, kept)
    assert read_listing(tmp_path) == kept


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"repo": 5}, InputError),
        ({"files": {}}, InputError),
        ({"files": [5]}, InputError),
        ({"files": [{"path": "a", "size": "1", "digest": "0" * 64}]}, InputError),
        ({"files": [{"path": "a", "size": 1, "digest": None}]}, InputError),
        ({"files": [{"path": "../a", "size": 1, "digest": "0" * 64}]}, SecurityError),
        ({"include": "*"}, InputError),
        ({"more": 1}, InputError),
    ],
)
def test_damaged_kept_listing_is_refused(tmp_path: Path, change: dict[str, Any], error: type[Glm4MoeError]) -> None:
    (tmp_path / ".glm4moe").mkdir()
    write_listing(tmp_path, listing("a"))
    path = tmp_path / ".glm4moe" / "listing.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error):
        read_listing(tmp_path)
    path.write_text("{")
    with pytest.raises(ConfigError):
        read_listing(tmp_path)


def test_index_that_names_an_absent_file_is_refused_before_any_shard(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    shards = [path for path in checkpoint_files if path.endswith(".safetensors")]
    hub.push("main", {path: data for path, data in checkpoint_files.items() if path != shards[1]})
    with pytest.raises(InputError) as raised:
        download()
    assert str(raised.value) == (
        f"{REPO}: model.safetensors.index.json: expected names of files that the repository has, found {shards[1]}. "
        "The upload is incomplete; choose another revision or ask its author."
    )
    assert hub.served[shards[0]] == 0
    assert read_folder(dst) == {}


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({"weight_map": {"a": "../../x.safetensors"}}, SecurityError),
        ({"weight_map": {"a": "/x.safetensors"}}, SecurityError),
        ({"weight_map": ["a"]}, InputError),
        ({}, InputError),
        ([], ConfigError),
    ],
)
def test_hostile_index_is_refused_before_any_shard(
    hub: FakeHub,
    download: Download,
    checkpoint_files: dict[str, bytes],
    index: object,
    error: type[Glm4MoeError],
) -> None:
    hub.push("main", {**checkpoint_files, "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(error):
        download()
    assert hub.asked("model-00001-of-00002.safetensors") == []


def test_shard_that_is_no_safetensors_is_told_at_the_end(
    hub: FakeHub, download: Download, checkpoint_files: dict[str, bytes]
) -> None:
    """The digest only proves that we have what the hub has."""
    hub.push("main", {**checkpoint_files, "model-00001-of-00002.safetensors": b"not a header"})
    with pytest.raises(InputError, match="The file is cut off or is not safetensors"):
        download()


def test_link_out_of_the_folder_is_not_followed(hub: FakeHub, download: Download, dst: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    download(include=("LICENSE",))
    (dst / "assets").symlink_to(tmp_path / "outside")
    with pytest.raises(SecurityError, match="expected a folder inside"):
        download()
    assert list((tmp_path / "outside").iterdir()) == []


def test_folder_in_the_place_of_a_file_is_refused(hub: FakeHub, download: Download, dst: Path) -> None:
    download(include=("LICENSE",))
    (dst / "config.json").mkdir()
    with pytest.raises(UsageError, match="expected a file or nothing"):
        download()
