"""The first contact and who may: gated, private, absent, tokens, redirects, retries, environment."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub, Fault, read_folder

from converters.download import Hub
from converters.errors import InputError, NetworkError, UsageError

ROOT = Path(__file__).parents[3]
TOKEN = "hf_" + "s3cret" * 6
Download = Callable[..., object]


def refusal(download: Download, **request: object) -> str:
    with pytest.raises(NetworkError) as raised:
        download(**request)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


def test_gated_without_a_token(hub: FakeHub, download: Download) -> None:
    hub.gated = True
    assert refusal(download).split(": ", 2)[2] == (
        "expected access to a gated repository, found none for no token. "
        f"Accept its terms at {hub.endpoint}/{REPO}, then set HF_TOKEN or run 'hf auth login'."
    )


def test_gated_with_a_token_that_was_not_granted(
    hub: FakeHub, download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "found none for the token sent. Accept its terms" in refusal(download)


def test_gated_takes_no_disk(hub: FakeHub, download: Download, dst: Path) -> None:
    hub.gated = True
    refusal(download)
    assert sum(path.stat().st_blocks for path in dst.rglob("*.partial")) == 0


def test_token_goes_to_the_hub_and_not_to_the_storage(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated, hub.token = True, TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    download()
    assert read_folder(dst) == checkpoint_files
    sent = {(server, headers.get("authorization")) for server, _, headers in hub.requests}
    assert sent == {("hub", f"Bearer {TOKEN}"), ("storage", None)}
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in dst.rglob("*") if path.is_file())


def test_token_that_is_no_header_is_not_repeated(
    hub: FakeHub, download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.build_hf_headers", lambda **_: {"authorization": f"Bearer {TOKEN}\n"})
    assert "LocalProtocolError" in refusal(download)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=401, headers={"X-Error-Message": f"bad {TOKEN}"}), "found none, or a private one, with no token"),
        (Fault(status=404, headers={"X-Error-Code": "RepoNotFound"}), "found none, or a private one, with no token"),
        (Fault(status=404), "found none, or a private one, with no token"),
        (Fault(status=403, body=TOKEN.encode()), "expected access, found HTTP 403 Forbidden, with no token"),
        (Fault(status=451), "expected access, found HTTP 451 Unavailable For Legal Reasons, with no token"),
        (Fault(status=400), "expected access, found HTTP 400 Bad Request, with no token"),
        (Fault(body=b"<html>Sign in</html>"), "expected the hub's API, found an answer of another kind"),
        (Fault(body=b"[]"), "expected the hub's API, found an answer of another kind"),
        (Fault(body=b'{"siblings": [{}]}'), "expected the hub's API, found an answer of another kind"),
    ],
)
def test_first_contact_refused(hub: FakeHub, download: Download, dst: Path, fault: Fault, message: str) -> None:
    hub.fail("api", fault)
    assert message in refusal(download)
    assert not dst.exists()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_first_contact_is_tried_again(hub: FakeHub, download: Download, status: int) -> None:
    hub.fail("api", Fault(status=status), Fault(status=status))
    download()
    hub.fail("api", *[Fault(status=status)] * 3)
    message = refusal(download, revision="main")
    assert message.startswith(f"{hub.endpoint}: expected the hub, found HTTP {status}, 3 times in a row. Check the ")


def test_silent_hub_is_not_waited_for(hub: FakeHub, download: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.fail("api", *[Fault(hold=-1)] * 3)
    assert "timed out, 3 times in a row" in refusal(download)


def test_no_hub_at_the_address(hub: FakeHub, download: Download) -> None:
    hub.hub.server_close()
    assert "Connection refused, 3 times in a row" in refusal(download)


def test_wrong_revision(hub: FakeHub, download: Download) -> None:
    assert refusal(download, revision="v9") == (
        f"{REPO} at v9: expected a branch, tag or commit, found none of this name. "
        f"{hub.endpoint}/{REPO}/commits lists them."
    )


def test_revision_may_be_a_branch_or_a_commit(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    other = hub.push("release/v1", {**checkpoint_files, "LICENSE": b"another"})
    download(revision=other)
    assert (dst / "LICENSE").read_bytes() == b"another"


def test_file_that_is_listed_but_not_served(
    hub: FakeHub, download: Download, checkpoint_files: dict[str, bytes]
) -> None:
    hub.siblings = hub.listing(hub.commit)
    del hub.commits[hub.commit]["LICENSE"]
    assert refusal(download).startswith(f"{REPO}: LICENSE: expected the file that the listing names, found none. ")


@pytest.mark.parametrize("repo", ["../x", "a/b/c", "-x", "a--b", "https://huggingface.co/a/b", "x.git", ""])
def test_impossible_repository_name(hub: FakeHub, repo: str) -> None:
    with pytest.raises(UsageError, match="expected owner/name"):
        Hub().list_files(repo, "main")
    assert hub.requests == []


def test_endpoint_without_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "localhost:8000")
    with pytest.raises(UsageError, match="HF_ENDPOINT: expected an address with http"):
        Hub()


def test_offline_without_a_listing(hub: FakeHub, download: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "expected a listing, found none in " in refusal(download)
    assert hub.requests == []


def test_file_that_plain_http_does_not_serve(
    hub: FakeHub, download: Download, dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 100_000)
    with pytest.raises(InputError) as raised:
        download()
    assert "expected at most 100000 bytes, as the hub serves over plain HTTP, found 145248" in str(raised.value)
    assert not dst.exists()


def test_environment_means_what_it_means_to_hf(hub: FakeHub, dst: Path, tmp_path: Path) -> None:
    """In a process of its own: the library reads most of it when it is imported."""
    hub.token = TOKEN
    hub.gated = True
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN + "\n")
    args = [sys.executable, "-m", "glm4moe_cli", "download", REPO, str(dst), "--quiet"]
    environment = {"PATH": "", "HF_ENDPOINT": f"{hub.endpoint}/", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(args, cwd=ROOT, env=environment, check=True)
    assert {path for _, path, _ in hub.requests if path.startswith("/api/")} == {f"/api/models/{REPO}/revision/main"}
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["token"]
    environment |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    subprocess.run(args, cwd=ROOT, env=environment, check=True)


def test_range_is_read_and_a_whole_file_is_proved(hub: FakeHub, checkpoint_files: dict[str, bytes]) -> None:
    client = Hub()
    listing = client.list_files(REPO, "main")
    files = {file.path: file for file in listing.files}
    data = checkpoint_files["config.json"]
    hub.fail("config.json", Fault(status=503), Fault(), Fault(ignore_range=True), Fault(cut=3))
    for begin, end in ((0, 8), (8, 40), (100, len(data)), (0, len(data))):
        assert client.read_range(listing, files["config.json"], begin, end) == data[begin:end]
    shard = files["model-00001-of-00002.safetensors"]
    assert client.read_range(listing, shard, 8, 16) == checkpoint_files[shard.path][8:16]
    hub.fail("config.json", Fault(body=data[:-1] + b"!"))
    with pytest.raises(InputError, match="expected git blob id"):
        client.read_range(listing, files["config.json"], 0, len(data))
    hub.fail("config.json", *[Fault(cut=1)] * 3)
    with pytest.raises(NetworkError, match="3 times in a row"):
        client.read_range(listing, files["config.json"], 0, 8)
