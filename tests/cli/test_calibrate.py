"""`glm4moe calibrate`: one file or none, never another's, the same bytes again; and the real thing on the fixture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import small_checkpoint, write_byte_tokenizer

from converters.quant.stats import CalibrationStats
from runtime.calibrate.layers import Stream
from tests.cli.conftest import Ended

Program = Callable[..., Ended]
TEXT = "The quick brown fox jumps over the lazy dog. " * 5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small random checkpoint with a tokenizer of bytes."""
    folder = small_checkpoint(tmp_path / "checkpoint", vocab_size=256)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def call(checkpoint: Path, tmp_path: Path) -> list[str]:
    """A command line that calibrates it on a text of 225 tokens."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--num-tokens", "200", "--context-length", "64", "--min-expert-tokens", "100", "--device", "cpu"]
    return ["calibrate", str(checkpoint), str(tmp_path / "s.json"), "--text", str(tmp_path / "text.txt"), *options]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_writes_statistics_and_says_how_the_experts_fared(program: Program, call: list[str], tmp_path: Path) -> None:
    ended = program(*call)
    assert ended.exit_code == 0, ended.stderr
    stats = CalibrationStats.load(tmp_path / "s.json")
    assert stats.provenance["num_tokens"] == 200
    assert f"sha256\t{stats.sha256}" in ended.stdout
    lines = ended.stdout.splitlines()
    header = lines.index("layer\texperts\tfewest tokens\tmedian tokens\tfilled")
    assert [line.split("\t")[:2] for line in lines[header + 1 : header + 4]] == [["1", "4"], ["2", "4"], ["3", "4"]]
    assert [line.split(":")[0] for line in ended.stderr.splitlines() if line.startswith("layer ")] == [
        f"layer {number}/4" for number in range(1, 5)
    ]


def test_the_same_job_again_writes_nothing_and_another_is_refused(
    program: Program, call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program(*call).exit_code == 0
    before = (tmp_path / "s.json").read_bytes()
    other = str(tmp_path / "other.json")
    assert program(*call[:2], other, *call[3:], "--max-memory", "100MB").exit_code == 0
    assert Path(other).read_bytes() == before
    monkeypatch.delattr(Stream, "run")
    ended = program(*call, "--json")
    assert (ended.exit_code, json.loads(ended.stdout)["result"]["already_finished"]) == (0, True)
    ended = program(*call, "--seed", "1")
    assert ended == Ended(
        2,
        "",
        f"Error: STATS {tmp_path / 's.json'}: expected a new file, or one with the same statistics, "
        "found another file. Remove it or choose another name; nothing is overwritten.\n",
    )
    (tmp_path / "s.json").write_text("mine")
    assert program(*call).exit_code == 2
    assert (tmp_path / "s.json").read_text() == "mine"


def test_json_is_one_document_with_the_coverage(program: Program, call: list[str], tmp_path: Path) -> None:
    document = json.loads(program(*call, "--json").stdout)
    stats = CalibrationStats.load(tmp_path / "s.json")
    result = document["result"]
    assert (result["sha256"], result["modules"]) == (stats.sha256, len(stats.input_amax))
    assert result["provenance"] == stats.provenance
    assert [row["layer"] for row in result["coverage"]] == [1, 2, 3]
    assert result["filled"] == len(stats.filled) > 0
    assert document["bytes"]["calibrate"] > 0


def test_dry_run_shows_the_memory_and_writes_nothing(program: Program, call: list[str], tmp_path: Path) -> None:
    before = names(tmp_path)
    ended = program(*call, "--dry-run", "--json")
    memory = json.loads(ended.stdout)["result"]["memory"]
    assert not memory["hidden_on_disk"]
    assert memory["hidden"] == 2 * 200 * 48 * 4
    peak = sum(value for key, value in memory.items() if key != "hidden_on_disk")
    ended = program(*call, "--dry-run", "--max-memory", str(peak - 1))
    assert "scratch file\t76.8kB" in ended.stdout
    assert program(*call, "--dry-run", "--max-memory", str(peak - memory["hidden"] - 1)).exit_code == 5
    assert names(tmp_path) == before


def test_an_interruption_leaves_nothing_but_its_state(
    program: Program, call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, run = names(tmp_path), Stream.run

    def interrupted(self: Stream, layer: int, module: object) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        run(self, layer, module)

    monkeypatch.setattr(Stream, "run", interrupted)
    # hidden states on disk, so that there is something to leave behind
    ended = program(*call, "--dry-run", "--json")
    memory = json.loads(ended.stdout)["result"]["memory"]
    budget = memory["weights"] + memory["activations"] + memory["routing"]
    assert program(*call, "--max-memory", str(budget)).exit_code == 130
    assert names(tmp_path) == {*before, ".s.json.unfinished"}


def test_texts_that_are_too_short_are_used_with_a_warning(program: Program, call: list[str], tmp_path: Path) -> None:
    ended = program(*call, "--num-tokens", "5000")
    assert ended.exit_code == 0
    assert "Warning: The texts have 225 tokens; 225 of them are used.\n" in ended.stderr


def test_a_place_without_folder_is_refused_first(program: Program, call: list[str], tmp_path: Path) -> None:
    place = tmp_path / "none" / "s.json"
    ended = program(*call[:2], str(place), *call[3:])
    assert ended == Ended(2, "", f"Error: STATS {place}: expected a file in an existing folder, found no such folder\n")


def test_the_trained_fixture_hears_all_its_experts(
    program: Program, tiny: Path, held_out: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "s.json"
    words = ("--text", str(held_out), "--num-tokens", "1024", "--context-length", "128", "--device", "cpu")
    assert program("calibrate", str(tiny), str(stats), *words).exit_code == 0
    found = CalibrationStats.load(stats)
    assert found.filled == {}
    assert min(found.tokens.values()) > 32
    assert all(0.1 < amax < 1000 for amax in found.input_amax.values())


INT8 = ("--scheme", "int8-weight-only")


def test_gptq_rounds_on_the_way_and_quantize_copies(program: Program, call: list[str], tmp_path: Path) -> None:
    src, stats, dst = Path(call[1]), tmp_path / "s.json", tmp_path / "dst"
    assert program(*call, "--method", "gptq", *INT8).exit_code == 0
    assert "gptq" in CalibrationStats.load(stats).provenance
    words = ("quantize", str(src), "--method", "gptq", *INT8)
    ended = program(*words, str(dst), "--stats", str(stats))
    assert ended.exit_code == 0, ended.stderr
    # one command does both, and gives the same bytes; its experts have the default number of tokens at least
    text = ("--calibrate", str(tmp_path / "text.txt"), "--num-tokens", "200", "--context-length", "64")
    assert program(*words, str(tmp_path / "once"), *text).exit_code == 0
    assert names(tmp_path / "once") == names(dst)
    assert (tmp_path / "once.stats.json").is_file()
    assert program(*words, str(tmp_path / "once"), *text).exit_code == 0
    # what was rounded is lost, but not the statistics: it is made again
    shutil.rmtree(tmp_path / "once.stats.json.gptq")
    assert program(*words, str(tmp_path / "once"), *text).exit_code == 0
    # codes were chosen by the text, and the card says so and what it cost
    card = (dst / "README.md").read_text()
    assert "--method gptq --stats STATS" in card
    assert "- Calibrated: codes, by GPTQ; num tokens 200, context length 64, seed 0\n- Text: sha256 `" in card
    assert "The worst 10:" in card
    assert "no text was used" not in card
    assert program("quantize", str(src), str(tmp_path / "plain"), *INT8).exit_code == 0
    file = next(path.name for path in sorted(dst.glob("*.safetensors")))
    assert (dst / file).read_bytes() != (tmp_path / "plain" / file).read_bytes()


def test_lost_rounded_weights_are_made_again(program: Program, call: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "s.json.gptq"
    assert program(*call, "--method", "gptq", *INT8).exit_code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    assert program(*call, "--method", "gptq", *INT8).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "gptq"), "--method gptq: expected --scheme, as in quantize, found none"),
        (INT8, "--scheme: expected --method gptq beside it, found --method minmax"),
        (("--ignore", "x"), "--ignore: expected --method gptq beside it, found --method minmax"),
    ],
)
def test_a_scheme_goes_with_gptq_alone(program: Program, call: list[str], words: tuple[str, ...], message: str) -> None:
    assert program(*call, *words) == Ended(2, "", f"Error: {message}\n")


def test_quantize_refuses_gptq_without_its_weights(program: Program, call: list[str], tmp_path: Path) -> None:
    words = ("quantize", call[1], str(tmp_path / "dst"), "--method", "gptq", *INT8)
    ended = program(*words)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Error: --method gptq: expected --calibrate TEXT, or --stats FILE of")
    assert program(*call).exit_code == 0
    ended = program(*words, "--stats", call[2])
    assert ended.exit_code == 2
    assert ended.stderr.startswith(
        f"Error: rounded weights {call[2]}.gptq: expected a folder with rounded.json, found none"
    )
    assert not (tmp_path / "dst").exists()


def test_a_flipped_bit_in_rounded_weights_is_found(program: Program, call: list[str], tmp_path: Path) -> None:
    assert program(*call, "--method", "gptq", *INT8).exit_code == 0
    file = sorted((tmp_path / "s.json.gptq").glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ended = program("quantize", call[1], str(tmp_path / "dst"), "--method", "gptq", *INT8, "--stats", call[2])
    assert ended.exit_code == 4
    assert ended.stderr.startswith(f"Error: {file}: expected sha256 ")
    assert not (tmp_path / "dst").exists()


def test_calibration_on_the_way_is_not_begun_in_vain(program: Program, call: list[str], tmp_path: Path) -> None:
    """A text takes hours: what the run would refuse afterwards is refused before."""
    src, text = call[1], ("--calibrate", str(tmp_path / "text.txt"), "--num-tokens", "64", "--context-length", "32")
    assert program("quantize", src, str(tmp_path / "taken"), "--scheme", "int8").exit_code == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refusals = {
        ("taken", "fp8-static"): f"DST {tmp_path}/taken: expected an empty or new folder, found the finished result",
        ("full", "fp8-static"): f"DST {tmp_path}/full: expected an empty or new folder, found files in it",
        ("new", "int8-weight-only", "--group-size", "128", "--kv-cache", "fp8"): "--scheme int8-weight-only in groups",
        ("new", "fp8-static", "--part", "1/2"): "--calibrate: expected --stats FILE beside --part",
    }
    for (dst, *words), message in refusals.items():
        ended = program("quantize", src, str(tmp_path / dst), "--scheme", *words, *text)
        assert ended.exit_code == 2, ended.stderr
        assert ended.stderr.startswith(f"Error: {message}")
    assert not list(tmp_path.glob("*.stats.json"))
