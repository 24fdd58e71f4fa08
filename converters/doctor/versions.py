"""Installed versions, against what this program needs and against known advisories.

Source of the ranges: the advisories named by their ids, as published; `fixed` is the first version without the fault.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTION = "glm4moe"
MINIMUM_PYTHON = (3, 11)
# looked at besides what this program declares as needed
OPTIONAL = ("triton", "compressed-tensors", "vllm", "sglang")
_REQUIREMENT = re.compile(r"([A-Za-z][\w.-]*?)\s*>=\s*([\d.]+)")
_NUMBERS = re.compile(r"\d+(?:\.\d+)*")
_PRE_RELEASE = re.compile(r"^[.-]?(?:a|b|c|rc|dev|alpha|beta|pre)", re.IGNORECASE)
Version = tuple[tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Advisory:
    """A published fault. Versions from `first` (any, if empty) up to, not including, `fixed` (none known, if empty)."""

    package: str
    identifier: str
    what: str
    first: str
    fixed: str

    def applies(self, version: str) -> bool:
        """Return whether a version has the fault."""
        found = parse_version(version)
        after_first = not self.first or found >= parse_version(self.first)
        return after_first and (not self.fixed or found < parse_version(self.fixed))


ADVISORIES = (
    Advisory("transformers", "CVE-2026-4372", "a config can load remote code with remote code off", "4.56.0", "5.3.0"),
    Advisory("transformers", "CVE-2026-5241", "a config can override the refusal of remote code", "5.2.0", "5.3.0"),
    Advisory("transformers", "CVE-2026-1839", "the trainer unpickles its random state", "", "5.0.0rc3"),
    Advisory("torch", "CVE-2025-32434", "torch.load runs code although weights_only is set", "", "2.6.0"),
    Advisory("torch", "GHSA-63cw-57p8-fm3p", "the weights_only unpickler corrupts memory", "", "2.10.0"),
    Advisory("jinja2", "CVE-2025-27516", "a template can leave the sandbox", "", "3.1.6"),
    Advisory("vllm", "CVE-2026-22807", "auto_map code runs with remote code off", "0.10.1", "0.14.0"),
    Advisory("vllm", "CVE-2025-62426", "template arguments can stall the server", "", "0.11.1"),
    Advisory("sglang", "CVE-2026-3059", "pickles are taken from the network", "", "0.5.10"),
    Advisory("sglang", "CVE-2026-5760", "a model's chat template runs outside a sandbox", "", ""),
)


@dataclass(frozen=True, slots=True)
class Package:
    """An installed or missing package; `minimum` is empty where this program does not need it."""

    name: str
    version: str | None
    minimum: str
    advisories: tuple[Advisory, ...]

    @property
    def problem(self) -> str:
        """Why this program cannot work with it; empty if it can."""
        if not self.minimum:
            return ""
        if self.version is None:
            return f"{self.name}: expected {self.minimum} or later, found none"
        if parse_version(self.version) < parse_version(self.minimum):
            return f"{self.name}: expected {self.minimum} or later, found {self.version}"
        return ""


def parse_version(text: str) -> Version:
    """Return a version for comparison: 5.0.0rc3 is before 5.0, 2.13.0+cpu is 2.13.

    Pre-releases of one version compare as equal but for the number that follows.
    """
    public = text.partition("+")[0]
    match = _NUMBERS.match(public)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    rest = public[match.end() :] if match else public
    if not _PRE_RELEASE.match(rest):
        return tuple(numbers), 1 << 20
    serial = _NUMBERS.search(rest)
    return tuple(numbers), int(serial[0].partition(".")[0]) if serial else 0


def packages() -> tuple[Package, ...]:
    """Return what this program needs and what it can use, with the advisories that apply."""
    return tuple(_package(name, minimum) for name, minimum in (*_requirements(), *((name, "") for name in OPTIONAL)))


def python_problem() -> str:
    """Return why this Python is too old; empty if it is not."""
    if sys.version_info >= MINIMUM_PYTHON:
        return ""
    return f"python: expected {'.'.join(map(str, MINIMUM_PYTHON))} or later, found {sys.version.split()[0]}"


def _requirements() -> Iterator[tuple[str, str]]:
    """Yield the declared dependencies; none where the program runs without being installed."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        declared = []
    for line in declared:
        match = _REQUIREMENT.match(line)
        if match and "extra ==" not in line:
            yield match[1].lower(), match[2]


def _package(name: str, minimum: str) -> Package:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, minimum, ())
    found = tuple(advisory for advisory in ADVISORIES if advisory.package == name and advisory.applies(version))
    return Package(name, version, minimum, found)
