"""Every way a command can fail: the whole message, the exit code, and the same facts in the JSON document."""

import errno
import json
import sys
from types import SimpleNamespace

import click
import pytest

from converters import errors
from converters.shard.limits import Limit, MappingRefused
from glm4moe_cli._errors import Stopped, describe
from glm4moe_cli._output import Output
from tests.cli.conftest import Probe

FACTS = {"expected": "shape [4, 8]", "found": "[4, 4]", "next_step": "Fetch it again."}
FACTS_TEXT = "x.safetensors: expected shape [4, 8], found [4, 4]"
AGAIN = "Run the same command again to go on from here."
LESS = "Lower --max-memory or --workers, or free some memory."
FREE = "Free some space and run the same command again."
CPU_OUT = "[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"

# what is raised, exit code, JSON code, message, hint, retryable
CASES = [
    (errors.Glm4MoeError("x.safetensors", **FACTS), 1, "internal", FACTS_TEXT, "Fetch it again.", False),
    (errors.UsageError("x.safetensors", **FACTS), 2, "usage", FACTS_TEXT, "Fetch it again.", False),
    (
        MappingRefused((Limit("experts", 4, 1, "--ep", "4 do not divide by 3", (1, 2, 4), "choose --ep 2"),)),
        2,
        "usage",
        "--ep: experts: expected a size that fits: 1, 2, 4, found 4 do not divide by 3",
        "Choose --ep 2.",
        False,
    ),
    (errors.VerificationFailed("KL", found="0.5"), 3, "verification-failed", "KL: found 0.5", "", False),
    (errors.InputError("x.safetensors", **FACTS), 4, "input", FACTS_TEXT, "Fetch it again.", False),
    (errors.ConfigError("x.safetensors", **FACTS), 4, "config", FACTS_TEXT, "Fetch it again.", False),
    (errors.ResourceError("x.safetensors", **FACTS), 5, "resource", FACTS_TEXT, "Fetch it again.", True),
    (errors.LockedError("x.safetensors", **FACTS), 6, "locked", FACTS_TEXT, "Fetch it again.", True),
    (errors.NetworkError("x.safetensors", **FACTS), 7, "network", FACTS_TEXT, "Fetch it again.", True),
    (errors.SecurityError("x.safetensors", **FACTS), 8, "security", FACTS_TEXT, "Fetch it again.", False),
    (Stopped("SIGTERM"), 75, "stopped", "stopped by SIGTERM", AGAIN, True),
    (KeyboardInterrupt(), 130, "interrupted", "interrupted", AGAIN, True),
    (click.Abort(), 130, "interrupted", "interrupted", AGAIN, True),
    (MemoryError(), 5, "resource", "out of memory", LESS, True),
    (MemoryError("3 GiB\nmore"), 5, "resource", "out of memory: 3 GiB", LESS, True),
    (RuntimeError(CPU_OUT), 5, "resource", f"out of memory: {CPU_OUT}", LESS, True),
    (OSError(errno.ENOSPC, "No space left", "d/f"), 5, "resource", "d/f: No space left", FREE, True),
    (OSError(errno.EDQUOT, "Quota exceeded"), 5, "resource", "the disk: Quota exceeded", FREE, True),
    (PermissionError(errno.EACCES, "Denied", "d"), 2, "usage", "d: Denied", "Check its owner and permissions.", False),
    (OSError(errno.EROFS, "Read-only", "d"), 2, "usage", "d: Read-only", "Check its owner and permissions.", False),
    (click.FileError("f", "gone"), 2, "usage", "Could not open file 'f': gone", "", False),
]  # fmt: skip


def raising(error: BaseException) -> object:
    def action(output: Output) -> None:
        raise error

    return action


@pytest.mark.parametrize(("error", "exit_code", "code", "message", "hint", "retryable"), CASES)
def test_error_has_its_text_and_exit_code(
    probe: Probe, error: BaseException, exit_code: int, code: str, message: str, hint: str, retryable: bool
) -> None:
    text = f"Error: {message}. {hint}\n" if hint else f"Error: {message}\n"
    assert probe(raising(error)) == (exit_code, "", text)
    assert probe(raising(error), "--quiet") == (exit_code, "", text)

    ended = probe(raising(error), "--json")
    document = json.loads(ended.stdout)
    assert (ended.exit_code, ended.stderr) == (exit_code, text)
    assert (document["ok"], document["exit_code"], document["command"]) == (False, exit_code, "probe")
    assert document["errors"] == [{"code": code, "message": message, "hint": hint, "retryable": retryable}]


def test_every_error_class_of_the_library_is_covered() -> None:
    def family(kind: type) -> set[type]:
        return {kind}.union(*map(family, kind.__subclasses__()))

    assert family(errors.Glm4MoeError) <= {type(case[0]) for case in CASES}


TRY = "Try 'glm4moe probe --help'."


def never(output: Output) -> None:
    pytest.fail("the command ran")


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--jsn"], "No such option '--jsn'. Did you mean '--json'?", TRY),
        (["extra"], "Got unexpected extra argument (extra)", TRY),
        (["--choice", "three"], "Invalid value for '--choice': 'three' is not one of 'one', 'two'.", TRY),
        (["--choice"], "Option '--choice' requires an argument.", ""),
        (["\x1b[31m\u202e"], "Got unexpected extra argument (\x1b[31m\u202e)", TRY),
    ],
)
def test_usage_error_is_one_line_and_answers_in_json(probe: Probe, args: list[str], message: str, hint: str) -> None:
    shown = message.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    stop = "." if message.endswith(")") else ""
    assert probe(never, *args) == (2, "", f"Error: {shown}{stop} {hint}".rstrip() + "\n")

    ended = probe(never, "--json", *args)
    document = json.loads(ended.stdout)
    assert (ended.exit_code, document["exit_code"], document["command"]) == (2, 2, "probe")
    assert document["errors"] == [{"code": "usage", "message": message, "hint": hint, "retryable": False}]


@pytest.mark.parametrize("args", [["--choice", "--json"], ["--", "--json"]])
def test_json_as_a_value_is_not_a_request_for_json(probe: Probe, args: list[str]) -> None:
    ended = probe(never, *args)
    assert (ended.exit_code, ended.stdout) == (2, "")


@pytest.mark.parametrize("error", [ValueError("boom"), FileNotFoundError(2, "gone", "f"), BrokenPipeError("worker")])
def test_a_bug_keeps_its_traceback(probe: Probe, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        probe(raising(error), "--json")
    assert raised.value is error
    streams = capsys.readouterr()
    document = json.loads(streams.out)
    assert (document["ok"], document["exit_code"], document["errors"][0]["code"]) == (False, 1, "internal")
    assert document["errors"][0]["message"] == f"{type(error).__name__}: {error}"
    hint = "This is a bug in glm4moe; please report it with its traceback."
    assert streams.err == f"Error: {type(error).__name__}: {error}. {hint}\n"


def test_gpu_out_of_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is looked up only if torch is loaded; a RuntimeError of another kind stays a bug."""

    class OutOfMemoryError(RuntimeError): ...

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(OutOfMemoryError=OutOfMemoryError))
    failure = describe(OutOfMemoryError("CUDA out of memory."))
    assert failure is not None
    assert (failure.exit_code, failure.retryable) == (5, True)
    assert describe(RuntimeError("shapes do not match")) is None
    monkeypatch.delitem(sys.modules, "torch")
    assert describe(OutOfMemoryError("CUDA out of memory.")) is None


def test_a_file_name_cannot_forge_a_second_message(probe: Probe) -> None:
    error = errors.InputError("a\nError: all is well\x1b[8m", found="b")
    assert probe(raising(error)).stderr == "Error: a\\nError: all is well\\x1b[8m: found b\n"
