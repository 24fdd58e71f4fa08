"""Parts: several processes write one folder, whoever finishes last completes it, and the bytes are those of one run."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from converters.errors import UsageError
from converters.parts import Part
from glm4moe_cli.main import run

ARGS = ("--max-shard-size", "40kB", "-q", "--workers", "1")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def whole(small: Path, tmp_path: Path) -> dict[str, str]:
    """Digests of the files that one process writes."""
    assert run(["convert", str(small), str(tmp_path / "whole"), *ARGS]) == 0
    return digests(tmp_path / "whole")


def convert(small: Path, dst: Path, *more: str) -> int:
    return run(["convert", str(small), str(dst), *ARGS, *more])


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_last_part_finishes_the_folder(
    small: Path, tmp_path: Path, whole: dict[str, str], order: tuple[int, ...]
) -> None:
    dst = tmp_path / "dst"
    for number in order:
        assert not (dst / "config.json").exists()
        assert convert(small, dst, "--part", f"{number}/3") == 0
    assert digests(dst) == whole


def test_part_says_what_is_left(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [arg for arg in ARGS if arg != "-q"]
    assert run(["convert", str(small), str(tmp_path / "dst"), *args, "--part", "1/2"]) == 0
    out = capsys.readouterr().out
    assert "written\t4 shards\n" in out
    assert (
        "unfinished\t3 shards are left to other parts; the last one to finish, or --finalize, writes the rest\n" in out
    )


def test_parts_at_the_same_time_give_the_bytes_of_one_run(small: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    dst = tmp_path / "dst"
    command = [sys.executable, "-m", "glm4moe_cli", "convert", str(small), str(dst), *ARGS]

    def start(number: int) -> int:
        return subprocess.run([*command, "--part", f"{number}/4"], timeout=120).returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(1, 5))) == [0, 0, 0, 0]
    assert digests(dst) == whole


def test_torchrun_ranks_are_parts(small: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    dst = tmp_path / "dst"
    program = tmp_path / "program.py"
    program.write_text("import sys\nfrom glm4moe_cli.main import main\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(program), "convert", str(small), str(dst), *ARGS], env=environment, timeout=300
    )
    assert done.returncode == 0
    assert digests(dst) == whole


def test_finalize_refuses_until_all_parts_are_done_and_then_completes(
    small: Path, tmp_path: Path, whole: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    assert convert(small, dst, "--part", "2/2") == 0
    assert convert(small, dst, "--finalize") == 2
    assert "expected all shards done, found 4 of 7 missing, model-00001-of-00007.safetensors among them" in (
        capsys.readouterr().err
    )
    assert not (dst / "config.json").exists()
    assert convert(small, dst, "--part", "1/2") == 0
    assert convert(small, dst, "--finalize") == 0
    assert digests(dst) == whole


def test_whole_run_takes_over_what_parts_left(small: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    dst = tmp_path / "dst"
    assert convert(small, dst, "--part", "2/3") == 0
    assert convert(small, dst) == 0
    assert digests(dst) == whole


def test_same_part_twice_and_whole_beside_part_are_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from converters.checkpoint.lock import locked

    dst = tmp_path / "dst"
    with locked(dst, Part(1, 2).suffix):
        assert convert(small, dst, "--part", "1/2") == 6
        assert f"DST {dst}: expected no other run in it, found process {os.getpid()} on " in capsys.readouterr().err
        assert convert(small, dst) == 6
        assert convert(small, dst, "--part", "2/2") == 0
    assert not (dst / "config.json").exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", " 1/2"])
def test_part_that_is_none_is_refused(small: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--part: expected i/n"):
        Part.parse(text)
    assert convert(small, tmp_path / "dst", "--part", text) == 2
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "more", [("--part", "1/2", "--restart"), ("--part", "1/2", "--finalize"), ("--restart", "--finalize")]
)
def test_options_that_undo_each_other_are_refused(small: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert convert(small, tmp_path / "dst", *more) == 2
    assert not (tmp_path / "dst").exists()


def test_ranks_outside_of_torchrun_mean_nothing() -> None:
    assert Part.from_environment({"RANK": "1", "WORLD_SIZE": "4"}) is None
    assert Part.from_environment({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}) == Part(2, 4)
    assert Part.from_environment({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}) is None
