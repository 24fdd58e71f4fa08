"""What a run would refuse is refused by name, by a dry run too, before the plan is printed, and nothing is created."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import REPO, serving

from converters.checkpoint.lock import locked
from tests.cli.conftest import Ended

Program = Callable[..., Ended]
ARGS = ("--max-shard-size", "40kB", "--workers", "1")


@pytest.fixture(params=[(), ("--dry-run",)], ids=["run", "dry-run"])
def mode(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def paths(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(program: Program, dst: Path, args: tuple[str, ...], code: int) -> str:
    """Return the message of a refusal that printed no plan and changed nothing."""
    before = paths(dst)
    ended = program(*args)
    assert ended.exit_code == code, ended.stderr
    assert ended.stdout == ""
    assert paths(dst) == before
    return ended.stderr


@pytest.fixture
def unfinished(small: Path, tmp_path: Path, program: Program) -> Path:
    """Half of a conversion to the packed layout."""
    dst = tmp_path / "dst"
    assert program("convert", str(small), str(dst), *ARGS, "--layout", "packed", "--part", "1/2").exit_code == 0
    return dst


def test_unfinished_job_of_other_options_is_named_with_both_values(
    small: Path, unfinished: Path, program: Program, mode: tuple[str, ...]
) -> None:
    args = ("convert", str(small), str(unfinished), *ARGS, "--mtp", "drop", *mode)
    message = refused(program, unfinished, args, 2)
    assert message == (
        f"Error: DST {unfinished}: options: expected those of the unfinished job in it, "
        "found layout: packed, here split; mtp: keep, here drop. "
        "Run that job's command, or begin anew with --restart.\n"
    )


def test_finished_result_of_other_options_is_named_too(
    small: Path, tmp_path: Path, program: Program, mode: tuple[str, ...]
) -> None:
    dst = tmp_path / "dst"
    assert program("convert", str(small), str(dst), *ARGS).exit_code == 0
    args = ("convert", str(small), str(dst), "--max-shard-size", "50kB", "--dtype", "float32", *mode)
    message = refused(program, dst, args, 2)
    options = "dtype: not given, here float32; max_shard_bytes: 40000, here 50000"
    assert f"found the finished result of another job ({options}). Redo it with --update" in message


def test_download_in_the_folder_is_refused(
    small: Path, tmp_path: Path, program: Program, mode: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    files = {path.name: path.read_bytes() for path in small.iterdir()}
    with serving(files, monkeypatch):
        assert program("download", REPO, str(dst), "-q").exit_code == 0
    message = refused(program, dst, ("convert", str(small), str(dst), *ARGS, *mode), 2)
    assert "found a download, finished or not" in message


def test_update_of_nothing_is_refused(small: Path, tmp_path: Path, program: Program, mode: tuple[str, ...]) -> None:
    dst = tmp_path / "dst"
    message = refused(program, dst, ("convert", str(small), str(dst), *ARGS, "--update", *mode), 2)
    assert "expected a finished result, found none" in message
    assert not dst.exists()


@pytest.mark.parametrize("part", [(), ("--part", "2/2")])
def test_folder_that_another_run_holds_is_refused(
    small: Path, unfinished: Path, program: Program, mode: tuple[str, ...], part: tuple[str, ...]
) -> None:
    args = ("convert", str(small), str(unfinished), *ARGS, "--layout", "packed", *part, *mode)
    with locked(unfinished):
        message = refused(program, unfinished, args, 6)
    assert f"expected no other run in it, found process {os.getpid()} on " in message
    assert program(*args).exit_code == 0


def test_part_that_another_run_holds_is_refused_and_the_other_part_is_not(
    small: Path, unfinished: Path, program: Program, mode: tuple[str, ...]
) -> None:
    args = ("convert", str(small), str(unfinished), *ARGS, "--layout", "packed")
    with locked(unfinished, "-2-of-2"):
        refused(program, unfinished, (*args, "--part", "2/2", *mode), 6)
        refused(program, unfinished, (*args, *mode), 6)
        assert program(*args, "--part", "1/2", *mode).exit_code == 0


def test_finalize_of_nothing_creates_nothing(
    small: Path, tmp_path: Path, program: Program, mode: tuple[str, ...]
) -> None:
    dst = tmp_path / "dst"
    message = refused(program, dst, ("convert", str(small), str(dst), *ARGS, "--finalize", *mode), 2)
    assert message.startswith(f"Error: --finalize {dst}: expected all shards done, found 7 of 7 missing, ")
    assert message.endswith("Run the parts that did not finish.\n")
    assert not dst.exists()


def test_finalize_before_the_last_part_is_refused_without_a_plan(
    small: Path, unfinished: Path, program: Program, mode: tuple[str, ...]
) -> None:
    args = ("convert", str(small), str(unfinished), *ARGS, "--layout", "packed", "--finalize", *mode)
    assert "missing, model-00002-of-" in refused(program, unfinished, args, 2)


@pytest.mark.parametrize("asked", [("--layout", "split"), ("--dtype", "bfloat16"), ("--mtp", "keep")])
def test_option_that_asks_for_what_is_there_makes_no_other_job(
    small: Path, tmp_path: Path, program: Program, asked: tuple[str, ...]
) -> None:
    plain, spelled = tmp_path / "plain", tmp_path / "spelled"
    assert program("convert", str(small), str(plain), *ARGS).exit_code == 0
    assert program("convert", str(small), str(spelled), *ARGS, *asked).exit_code == 0
    assert {Path(name).name: data for name, data in paths(plain).items()} == {
        Path(name).name: data for name, data in paths(spelled).items()
    }
    ended = program("convert", str(small), str(plain), *ARGS, *asked, "--json")
    assert json.loads(ended.stdout)["result"]["outcome"]["already_finished"]


def test_dtype_that_changes_something_is_another_job(small: Path, tmp_path: Path, program: Program) -> None:
    assert program("convert", str(small), str(tmp_path / "dst"), *ARGS).exit_code == 0
    for dtype in ("float16", "float32"):
        ended = program("convert", str(small), str(tmp_path / "dst"), *ARGS, "--dtype", dtype)
        assert (ended.exit_code, f"dtype: not given, here {dtype}" in ended.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("SRC", ("convert", "", "DST")),
        ("DST", ("convert", "SMALL", "")),
        ("SRC", ("quantize", "", "DST", "--scheme", "fp8")),
        ("DST", ("quantize", "SMALL", "", "--scheme", "fp8")),
        ("REPO", ("download", "", "DST")),
        ("DST", ("download", REPO, "")),
        ("CKPT", ("inspect", "")),
        ("CKPT", ("verify", "", "--against", "SMALL")),
        ("--against", ("verify", "SMALL", "--against", "")),
        ("--text", ("verify", "SMALL", "--against", "SMALL", "--text", "")),
        ("CKPT", ("generate", "", "--prompt", "a")),
        ("--prompts-file", ("generate", "SMALL", "--prompts-file", "")),
    ],
)
def test_empty_path_is_not_taken_for_the_current_folder(
    small: Path,
    tmp_path: Path,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    args: tuple[str, ...],
) -> None:
    """`convert X "$UNSET"` filled the folder where one stood."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"SMALL": str(small), "DST": str(tmp_path / "dst")}
    ended = program(*(places.get(arg, arg) for arg in args))
    assert ended.exit_code == 2
    assert name in ended.stderr
    assert "expected a name, found an empty word. Is a variable not set?" in ended.stderr
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("more", [(), ("--verify-only",), ("--dry-run",)])
@pytest.mark.parametrize("repo", ["bad", "a/b/c", "../x", "org/", "org/name@v1"])
def test_name_that_no_repository_has_is_refused_before_anybody_is_asked(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, repo: str, more: tuple[str, ...]
) -> None:
    with serving({}, monkeypatch) as hub:
        ended = program("download", repo, str(tmp_path / "dst"), *more)
        assert hub.requests == []
    assert ended.exit_code == 2
    assert f"Error: REPO {repo!r}: expected org/name, as the hub spells it, found {repo!r}" in ended.stderr
    assert ("--revision" in ended.stderr) == ("@" in repo)


@pytest.mark.parametrize("command", ["convert", "quantize", "shard", "download"])
@pytest.mark.parametrize("place", ["/proc/glm4moe", "/proc/self/task/out/deep"])
def test_dst_where_no_folder_can_be_made(
    small: Path, program: Program, mode: tuple[str, ...], command: str, place: str
) -> None:
    """It was taken for a folder that another run had removed, with exit code 6."""
    options = {"quantize": ("--scheme", "fp8"), "shard": ("--tp", "2")}.get(command, ())
    src = REPO if command == "download" else str(small)
    ended = program(command, src, place, *options, *mode)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (
        2,
        "",
        f"Error: DST {place}: expected a folder on a disk, found a file system of type proc, in which none can be "
        "made. Choose another folder.\n",
    )
