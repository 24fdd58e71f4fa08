"""Every kind of result in its four renderings, and the rules of the two streams."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from threading import Thread

import pytest

from glm4moe_cli import __version__
from glm4moe_cli._errors import Failure
from glm4moe_cli._output import Output
from glm4moe_cli._progress import LineView, Progress
from glm4moe_cli._text import format_bytes, format_seconds
from tests.cli.conftest import Probe

Action = Callable[[Output], object]
LONG_NAME = "model.layers.45.mlp.shared_experts.down_proj.weight_" + "x" * 60


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def render(action: Action, *, terminal: bool, as_json: bool = False, quiet: bool = False) -> tuple[str, str]:
    kind = Terminal if terminal else io.StringIO
    stdout, stderr = kind(), kind()
    output = Output("probe", as_json=as_json, quiet=quiet, stdout=stdout, stderr=stderr, clock=Clock())
    action(output)
    output.finish()
    return stdout.getvalue(), stderr.getvalue()


def plain(text: str) -> str:
    """Return what a terminal shows: no colours, no blanks at the ends of lines."""
    return re.sub(r" +$", "", re.sub(r"\x1b\[[0-9;]*m", "", text), flags=re.MULTILINE)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compare a result's whole stdout on a terminal of 80 columns, piped, with --json and with --quiet."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")

    def compare(action: Action, *, human: str, piped: str, quiet: str, result: object = None, stderr: str = "") -> None:
        for terminal, expected in ((True, human), (False, piped)):
            stdout, errors = render(action, terminal=terminal)
            assert plain(stdout) == expected
            assert errors == stderr
        stdout, _ = render(action, terminal=False, quiet=True)
        assert stdout == quiet
        stdout, errors = render(action, terminal=False, as_json=True)
        assert stdout.count("\n") == 1
        assert json.loads(stdout)["result"] == result
        assert errors == stderr

    return compare


def test_table(check: Callable[..., None]) -> None:
    def action(output: Output) -> None:
        output.table("Shards", ["file", "bytes"], [("a.safetensors", 5), ("b", 1234)])
        output.result({"shards": [{"file": "a.safetensors", "bytes": 5}]})

    check(
        action,
        human="Shards\nfile           bytes\na.safetensors      5\nb               1234\n",
        piped="file\tbytes\na.safetensors\t5\nb\t1234\n",
        quiet="",
        result={"shards": [{"file": "a.safetensors", "bytes": 5}]},
    )


def test_table_cuts_no_name_however_narrow_the_terminal(check: Callable[..., None]) -> None:
    human = f"Tensors\nname{'':<71}bytes\n{LONG_NAME[:73]}{5:>7}\n{LONG_NAME[73:]}\n"
    check(
        lambda output: output.table("Tensors", ["name", "bytes"], [(LONG_NAME, 5)]),
        human=human,
        piped=f"name\tbytes\n{LONG_NAME}\t5\n",
        quiet="",
    )


def test_empty_table_keeps_its_header(check: Callable[..., None]) -> None:
    check(lambda output: output.table("None", ["a"], []), human="None\na\n", piped="a\n", quiet="")


def test_facts(check: Callable[..., None]) -> None:
    check(
        lambda output: output.facts("Plan", {"write": "7.0GB", "peak memory": 3}),
        human="Plan\nwrite        7.0GB\npeak memory  3\n",
        piped="write\t7.0GB\npeak memory\t3\n",
        quiet="",
    )


def test_line_and_stream_are_data_that_quiet_keeps(check: Callable[..., None]) -> None:
    def action(output: Output) -> None:
        output.line("one")
        output.stream("tw")
        output.stream("o\n")

    check(action, human="one\ntwo\n", piped="one\ntwo\n", quiet="one\ntwo\n")


def test_hint_goes_to_stderr_in_every_mode_but_quiet(check: Callable[..., None]) -> None:
    check(lambda output: output.hint("next"), human="", piped="", quiet="", stderr="Hint: next\n")
    assert render(lambda output: output.hint("next"), terminal=True, quiet=True) == ("", "")


def test_warning_goes_to_stderr_and_into_the_document(check: Callable[..., None]) -> None:
    check(lambda output: output.warning("mind"), human="", piped="", quiet="", stderr="Warning: mind\n")
    assert render(lambda output: output.warning("mind"), terminal=True, quiet=True)[1] == "Warning: mind\n"
    assert json.loads(render(lambda output: output.warning("mind"), terminal=False, as_json=True)[0])["warnings"] == [
        "mind"
    ]


HOSTILE = "a\x1b[31m\x07\u061c\u200f\u2066\u202eb\u2028\x9b\udcff\t\nc"
HARMLESS = r"a\x1b[31m\x07\u061c\u200f\u2066\u202eb\u2028\x9b\udcff\t\nc"


def test_names_cannot_steer_the_terminal_or_forge_lines(check: Callable[..., None]) -> None:
    check(lambda output: output.line(HOSTILE), human=f"{HARMLESS}\n", piped=f"{HARMLESS}\n", quiet=f"{HARMLESS}\n")
    check(
        lambda output: output.facts("T", {HOSTILE: 1}), human=f"T\n{HARMLESS}  1\n", piped=f"{HARMLESS}\t1\n", quiet=""
    )
    check(lambda output: output.table(HOSTILE, ["x"], [[HOSTILE]]), human=f"{HARMLESS}\nx\n{HARMLESS}\n",
          piped=f"x\n{HARMLESS}\n", quiet="")  # fmt: skip
    check(lambda output: output.hint(HOSTILE), human="", piped="", quiet="", stderr=f"Hint: {HARMLESS}\n")
    check(lambda output: output.warning(HOSTILE), human="", piped="", quiet="", stderr=f"Warning: {HARMLESS}\n")


def test_rich_markup_is_text(check: Callable[..., None]) -> None:
    name = "[red]x[/red] [/] :smile:"
    check(
        lambda output: output.facts(name, {name: name}),
        human=f"{name}\n{name}  {name}\n",
        piped=f"{name}\t{name}\n",
        quiet="",
    )
    check(lambda output: output.warning(name), human="", piped="", quiet="", stderr=f"Warning: {name}\n")


def test_generated_text_is_disarmed_on_a_terminal_and_untouched_in_a_pipe() -> None:
    text = "\x1b[2J two\n\tlines \u202e"
    assert render(lambda output: output.stream(text), terminal=True)[0] == "\\x1b[2J two\n\tlines \\u202e"
    assert render(lambda output: output.stream(text), terminal=False)[0] == text


def test_text_that_the_encoding_lacks_is_escaped() -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Output(stdout=stdout).line("caf\u00e9")
    assert stdout.buffer.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(variable, value)
    stdout, _ = render(lambda output: output.table("T", ["a"], [["b"]]), terminal=True)
    assert re.findall(r"\x1b\[(?:3|4|9|10)\d[0-9;]*m", stdout) == []
    if variable == "TERM":
        assert "\x1b" not in stdout


class Colour(StrEnum):
    RED = "red"


@dataclass
class Point:
    x: float
    place: Path


def test_document_spells_out_what_json_lacks() -> None:
    value = {"point": Point(math.inf, Path("a/b")), "set": {2, 1}, "pair": (Colour.RED, math.nan), 3: -math.inf}
    stdout, _ = render(lambda output: output.result(value), terminal=False, as_json=True)
    expected = {"point": {"x": "Infinity", "place": "a/b"}, "set": [1, 2], "pair": ["red", "NaN"], "3": "-Infinity"}
    assert json.loads(stdout)["result"] == expected


def test_document_of_a_success(probe: Probe) -> None:
    def action(output: Output) -> None:
        with output.progress("quantize", 100, done_bytes=40) as progress:
            progress.advance(60)
        output.warning("mind")
        output.result({"files": 2})

    ended = probe(action, "--json")
    document = json.loads(ended.stdout)
    timings = document.pop("timings")
    assert set(timings) == {"total", "quantize"}
    assert 0 <= timings["quantize"] <= timings["total"]
    assert document == {
        "schema": "glm4moe.result/1",
        "version": __version__,
        "command": "probe",
        "ok": True,
        "exit_code": 0,
        "result": {"files": 2},
        "warnings": ["mind"],
        "errors": [],
        "bytes": {"quantize": 60},
    }


def test_document_of_a_failure_keeps_the_result() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    output = Output("verify", as_json=True, stdout=stdout, stderr=stderr)
    output.result({"kl": 0.5})
    assert output.finish(Failure(3, "verification-failed", "too far", "Look at layer 3.")) == 3
    document = json.loads(stdout.getvalue())
    assert (document["ok"], document["exit_code"], document["result"]) == (False, 3, {"kl": 0.5})
    assert document["errors"] == [
        {"code": "verification-failed", "message": "too far", "hint": "Look at layer 3.", "retryable": False}
    ]
    assert stderr.getvalue() == "Error: too far. Look at layer 3.\n"


def piped_progress(total_bytes: int, steps: list[tuple[float, int]], done_bytes: int = 0) -> list[str]:
    """Return the lines that a pipe gets; each step is (seconds that pass, bytes then done)."""
    clock, lines = Clock(), []
    progress = Progress("quantize", total_bytes, done_bytes, LineView(lines.append), clock)
    for seconds, num_bytes in steps:
        clock.now += seconds
        progress.advance(num_bytes)
    return lines


def test_piped_progress_prints_a_line_every_five_percent() -> None:
    lines = piped_progress(7 * 10**9, [(0.1, 10**7)] * 700)
    assert len(lines) == 20
    assert lines[0] == "step=quantize done=350.0MB/7.0GB rate=100.0MB/s eta=1m06s"
    assert lines[-1] == "step=quantize done=7.0GB/7.0GB rate=100.0MB/s eta=0s"


def test_piped_progress_prints_a_line_every_thirty_seconds() -> None:
    assert len(piped_progress(10**12, [(10.0, 1000)] * 9)) == 3


def test_piped_progress_of_a_resumed_run_counts_its_own_bytes_only() -> None:
    assert piped_progress(1000, [(2.0, 100)], done_bytes=700) == ["step=quantize done=800B/1.0kB rate=50B/s eta=4s"]


def test_piped_progress_of_nothing_prints_nothing() -> None:
    assert piped_progress(0, [(0.0, 0)]) == []


def test_piped_progress_says_what_it_works_on() -> None:
    def action(output: Output) -> None:
        with output.progress("convert", 10) as progress:
            progress.describe("a\x1b.safetensors")
            progress.advance(10)

    assert render(action, terminal=False)[1] == "step=convert done=10B/10B at=a\\x1b.safetensors\n"
    assert render(action, terminal=False, as_json=True)[1] == "step=convert done=10B/10B at=a\\x1b.safetensors\n"
    assert render(action, terminal=False, quiet=True) == ("", "")
    assert render(action, terminal=True, quiet=True) == ("", "")


def test_progress_counts_every_byte_of_every_thread() -> None:
    def action(output: Output) -> None:
        with output.progress("convert", 8000) as progress:
            threads = [Thread(target=lambda: [progress.advance(1) for _ in range(1000)]) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    assert json.loads(render(action, terminal=False, as_json=True)[0])["bytes"] == {"convert": 8000}


def test_terminal_shows_a_bar_that_leaves_nothing_behind_and_breaks_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")

    def action(output: Output) -> None:
        with output.progress("quantize", 2_000_000) as progress:
            progress.advance(1_000_000)
            progress.describe("[red]shard")
            output.warning("mind")
            progress.advance(1_000_000)

    stdout, stderr = render(action, terminal=True)
    shown = plain(stderr)
    assert stdout == ""
    assert "quantize [red]shard" in shown
    assert "1.0/2.0 MB" in shown
    assert re.search(r"^(?:\x1b\[\S*?[A-Za-z]|\r)*Warning: mind$", shown, re.MULTILINE)
    # the last thing the bar does is to erase its line and bring the cursor back
    assert shown.rindex("\x1b[2K") > shown.rindex("quantize")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_dumb_terminal_gets_lines_instead_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")

    def action(output: Output) -> None:
        with output.progress("convert", 1) as progress:
            progress.advance(1)

    assert render(action, terminal=True)[1] == "step=convert done=1B/1B\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1.0kB"), (999_949, "999.9kB"), (999_950, "1.0MB"), (412.1e9, "412.1GB"),
     (7e17, "700.0PB")],
)  # fmt: skip
def test_bytes_are_spelled_in_decimal_units(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (9, "9s"), (59.6, "1m00s"), (232, "3m52s"), (3599.7, "1h00m"), (7500, "2h05m")]
)
def test_durations_are_spelled_to_the_second(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


CLOSED_PIPE = """
import sys
from glm4moe_cli import main
from tests.cli.test_output import forever
import types, click
from glm4moe_cli._options import output_options
module = types.ModuleType("probe_module")
module.command = click.command()(output_options(forever))
sys.modules["probe_module"] = module
main.COMMANDS["probe"] = ("probe_module:command", "")
main.main()
"""


def forever(output: Output) -> None:
    """Print until nobody reads."""
    while True:
        output.line("x" * 1000)


@pytest.mark.parametrize("args", [["probe"], ["--help"]])
def test_reader_that_goes_away_ends_the_command_in_silence(args: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED_PIPE, *args], cwd=root, stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, b"")
