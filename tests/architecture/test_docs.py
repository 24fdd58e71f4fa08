"""README.md names every command and option that exists, and no other."""

import re

import pytest

from tests.architecture.commands import live_commands, long_options
from tests.architecture.sources import ROOT

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*)")
# options of the group itself, and of every command
_GLOBAL = {"--help", "--version"}


def command_lines(text: str) -> list[str]:
    """Return code lines and spans of a Markdown text, continued lines joined and `$ ` taken off."""
    blocks = "\n".join(_FENCE.findall(text)).replace("\\\n", " ")
    spans = _SPAN.findall(_FENCE.sub("", text))
    return [line.strip().removeprefix("$ ") for line in (*blocks.splitlines(), *spans)]


def differences(text: str, surface: dict[str, set[str]]) -> list[str]:
    """Return where the text and the commands disagree."""
    found, named_commands, named_options = [], set(), set()
    known_options = set().union(*surface.values()) | _GLOBAL
    for line in command_lines(text):
        for call in re.findall(r"(?<![\w/.-])glm4moe ([^|;&#`]+)", line):
            command = call.split()[0]
            options = set(_OPTION.findall(call))
            named_options |= options
            if re.fullmatch(r"[a-z][a-z-]*", command):
                named_commands.add(command)
                allowed = surface.get(command, set()) | _GLOBAL
                found += [f"glm4moe {command} has no {option}" for option in sorted(options - allowed)]
        if line.startswith("--"):
            options = set(_OPTION.findall(line))
            named_options |= options
            found += [f"no command has {option}" for option in sorted(options - known_options)]
    found += [f"there is no command {command}" for command in sorted(named_commands - set(surface))]
    found += [f"command {command} is not named" for command in sorted(set(surface) - named_commands)]
    missing = {command: options - named_options for command, options in surface.items()}
    found += [f"option {option} of {name} is not named" for name in missing for option in sorted(missing[name])]
    return found


def test_readme_names_what_exists_and_nothing_else() -> None:
    surface = {name: long_options(command) for name, command in live_commands().items()}
    assert differences((ROOT / "README.md").read_text(encoding="utf-8"), surface) == []


SURFACE = {"convert": {"--dtype", "--json"}, "verify": {"--level"}}
GOOD = """
Run `glm4moe convert SRC DST --json`; `--dtype` casts. Also `pip install --upgrade pip`.

```bash
$ glm4moe verify OUT \\
    --level bytes && vllm serve OUT --tensor-parallel-size 2
glm4moe --version
```
"""


def test_a_complete_text_passes() -> None:
    assert differences(GOOD, SURFACE) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("--dtype", "--type", ["no command has --type", "option --dtype of convert is not named"]),
        ("--level", "--dtype", ["glm4moe verify has no --dtype", "option --level of verify is not named"]),
        ("glm4moe verify", "glm4moe check", [
            "glm4moe check has no --level", "there is no command check", "command verify is not named",
        ]),
        ("convert SRC DST --json", "convert SRC DST", ["option --json of convert is not named"]),
    ],
)  # fmt: skip
def test_a_difference_is_seen(old: str, new: str, expected: list[str]) -> None:
    assert differences(GOOD.replace(old, new), SURFACE) == expected
