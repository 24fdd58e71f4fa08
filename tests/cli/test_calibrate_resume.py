"""`glm4moe calibrate` cut off: the same command goes on behind the last layer, any other one is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import small_checkpoint, write_byte_tokenizer

from runtime.calibrate.layers import Stream
from runtime.calibrate.state import POINT_FILE, kept_state, state_place
from tests.cli.conftest import Ended

Program = Callable[..., Ended]
TEXT = "The quick brown fox jumps over the lazy dog. " * 3
GPTQ = ("--method", "gptq", "--scheme", "int8-weight-only")
NUM_LAYERS = 4
HIDDEN_BYTES = 100 * 48 * 4


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    """A command line that calibrates a small random checkpoint."""
    folder = small_checkpoint(tmp_path / "checkpoint", vocab_size=256)
    write_byte_tokenizer(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "out").mkdir()
    options = ["--num-tokens", "100", "--context-length", "50", "--device", "cpu"]
    return ["calibrate", str(folder), str(tmp_path / "out/s.json"), "--text", str(tmp_path / "text.txt"), *options]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the statistics."""
    return tmp_path / "out"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were run; a run is interrupted when it comes to the one that `stop` names."""
    layers: list[int] = []
    run = Stream.run

    def watched(self: Stream, layer: int, module: object) -> None:
        if os.environ.get("STOP_AT") == str(layer):
            raise KeyboardInterrupt
        layers.append(layer)
        run(self, layer, module)

    monkeypatch.setattr(Stream, "run", watched)
    return layers


@pytest.fixture
def stopped(program: Program, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run a command line that is interrupted when it comes to a layer."""

    def run(layer: int, *words: str) -> Ended:
        monkeypatch.setenv("STOP_AT", str(layer))
        ended = program(*words)
        monkeypatch.delenv("STOP_AT")
        assert ended.exit_code == 130
        ran.clear()
        return ended

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undisturbed(program: Program, call: list[str], out: Path) -> dict[str, bytes]:
    """Return the files of a run that nothing happens to, and remove them."""
    assert program(*call).exit_code == 0
    found = files(out)
    for name in found:
        (out / name).unlink()
    for folder in out.iterdir():
        folder.rmdir()
    return found


@pytest.mark.parametrize("method", [(), GPTQ], ids=["minmax", "gptq"])
@pytest.mark.parametrize("layer", range(1, NUM_LAYERS))
def test_the_same_command_goes_on(
    program: Program,
    call: list[str],
    out: Path,
    ran: list[int],
    stopped: Callable[..., Ended],
    layer: int,
    method: tuple[str, ...],
) -> None:
    call += method
    expected = undisturbed(program, call, out)
    stopped(layer, *call)
    assert not (out / "s.json").exists()
    ended = program(*call)
    assert ended.exit_code == 0, ended.stderr
    assert f"an earlier run finished {layer} layers; this one goes on" in ended.stderr
    assert ran == list(range(layer, NUM_LAYERS))
    assert files(out) == expected
    assert not list(out.glob(".*"))


def test_quantize_goes_on_with_its_calibration(
    program: Program, call: list[str], out: Path, ran: list[int], stopped: Callable[..., Ended]
) -> None:
    text = ("--calibrate", call[4], "--num-tokens", "100", "--context-length", "50")
    words = ["quantize", call[1], str(out / "dst"), *GPTQ, *text]
    assert program(*words).exit_code == 0
    expected = files(out)
    words[2] = str(out / "again")
    stopped(2, *words)
    assert program(*words).exit_code == 0
    assert ran == [2, 3]
    again = {name.replace("again", "dst"): data for name, data in files(out).items() if name.startswith("again")}
    assert again == expected


def test_before_the_first_layer_nothing_is_kept(call: list[str], out: Path, stopped: Callable[..., Ended]) -> None:
    stopped(0, *call, *GPTQ)
    assert list(out.iterdir()) == []


def test_only_the_last_layer_is_kept(call: list[str], out: Path, stopped: Callable[..., Ended]) -> None:
    stopped(2, *call)
    state = state_place(out / "s.json") / ".glm4moe"
    assert {path.name for path in state.iterdir()} == {"lock", POINT_FILE, "hidden-00002.f32"}
    assert (state / "hidden-00002.f32").stat().st_size == HIDDEN_BYTES


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--seed", "1"), "seed: 0, here 1"),
        (("--min-expert-tokens", "7"), "min_expert_tokens: 32, here 7"),
        (GPTQ, "scheme: not given, here int8-weight-only"),
        (("--text", "MORE"), "text 2: not given, here sha256 "),
    ],
)
def test_another_job_is_refused_with_what_differs(
    program: Program,
    call: list[str],
    out: Path,
    ran: list[int],
    stopped: Callable[..., Ended],
    words: tuple[str, ...],
    found: str,
) -> None:
    stopped(2, *call)
    before = files(out)
    (out.parent / "more.txt").write_text("And more of it.")
    words = tuple(str(out.parent / "more.txt") if word == "MORE" else word for word in words)
    ended = program(*call, *words)
    assert ended.exit_code == 2
    assert ended.stderr.splitlines()[-1].startswith(
        f"Error: unfinished calibration in {state_place(out / 's.json')}: expected the same model, texts and options, "
    )
    assert found in ended.stderr
    assert ended.stderr.endswith("Run that job's command, or begin anew with --restart.\n")
    assert {name: data for name, data in files(out).items() if not name.endswith("lock")} == {
        name: data for name, data in before.items() if not name.endswith("lock")
    }
    assert ran == []
    assert program(*call, *words, "--restart").exit_code == 0
    assert ran == list(range(NUM_LAYERS))


def test_a_source_that_was_written_again_is_refused(
    program: Program, call: list[str], stopped: Callable[..., Ended]
) -> None:
    stopped(2, *call)
    file = sorted(Path(call[1]).glob("*.safetensors"))[0]
    os.utime(file, ns=(1, 1))
    ended = program(*call)
    assert ended.exit_code == 2
    assert "found source files: 2, sha256 over names, sizes and times " in ended.stderr


def test_the_gptq_files_of_an_abandoned_run_go(
    program: Program, call: list[str], out: Path, stopped: Callable[..., Ended]
) -> None:
    expected = undisturbed(program, call, out)
    stopped(2, *call, *GPTQ)
    assert (out / "s.json.gptq").is_dir()
    assert program(*call, "--restart").exit_code == 0
    assert files(out) == expected
    assert [path.name for path in out.iterdir()] == ["s.json"]


@pytest.mark.parametrize("name", [POINT_FILE, "hidden-00002.f32", "gptq-layer-00001.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_of_what_is_damaged_nothing_is_used(
    program: Program, call: list[str], out: Path, ran: list[int], stopped: Callable[..., Ended], name: str, damage: str
) -> None:
    call += GPTQ
    expected = undisturbed(program, call, out)
    stopped(2, *call)
    (path,) = out.rglob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    if damage == "removed":
        path.unlink()
    ended = program(*call)
    assert ended.exit_code == 0, ended.stderr
    assert ("What an earlier run left is damaged, and this one begins anew" in ended.stderr) == (
        (name, damage) != (POINT_FILE, "removed")
    )
    assert ran == list(range(NUM_LAYERS))
    assert files(out) == expected
    assert not list(out.glob(".*"))


def test_two_at_once_are_refused(program: Program, call: list[str], out: Path) -> None:
    with kept_state(out / "s.json", {}, lambda _: None):
        ended = program(*call)
    assert ended.exit_code == 6
    assert "expected no other run" in ended.stderr
    assert list(out.iterdir()) == []


def test_the_plan_says_how_much_disk_it_takes(program: Program, call: list[str], out: Path) -> None:
    ended = program(*call, "--dry-run")
    line = next(line for line in ended.stdout.splitlines() if line.startswith("disk\t"))
    assert line.endswith(" beside STATS for an unfinished run")
    assert list(out.iterdir()) == []
