"""Versions against what is needed and against known advisories."""

from importlib import metadata

import pytest

from converters.doctor import versions
from converters.doctor.versions import ADVISORIES, Package, packages, parse_version


def test_versions_are_ordered() -> None:
    spellings = ["2.6.0", "2.9.1", "2.10.0rc1", "2.10.0rc2", "2.10", "2.10.1", "2.13.0+cpu", "5.0.0.dev3", "5.0"]
    parsed = [parse_version(text) for text in spellings]
    assert parsed == sorted(parsed)
    assert len(set(parsed)) == len(parsed)
    assert parse_version("2.10") == parse_version("2.10.0") == parse_version("2.10.0+cu128")


@pytest.mark.parametrize(
    ("name", "version", "identifiers"),
    [
        ("transformers", "5.3.0", []),
        ("transformers", "5.2.0", ["CVE-2026-4372", "CVE-2026-5241"]),
        ("transformers", "4.57.6", ["CVE-2026-4372", "CVE-2026-1839"]),
        ("transformers", "4.55.0", ["CVE-2026-1839"]),
        ("transformers", "5.0.0rc3", ["CVE-2026-4372"]),
        ("torch", "2.13.0+cpu", []),
        ("torch", "2.9.1", ["GHSA-63cw-57p8-fm3p"]),
        ("torch", "2.5.1", ["CVE-2025-32434", "GHSA-63cw-57p8-fm3p"]),
        ("jinja2", "3.1.5", ["CVE-2025-27516"]),
        ("jinja2", "3.1.6", []),
        ("vllm", "0.13.0", ["CVE-2026-22807"]),
        ("vllm", "0.14.0", []),
        ("sglang", "0.5.10", ["CVE-2026-5760"]),
    ],
)
def test_advisories_apply_to_their_versions_only(name: str, version: str, identifiers: list[str]) -> None:
    found = [advisory.identifier for advisory in ADVISORIES if advisory.package == name and advisory.applies(version)]
    assert found == identifiers


def test_installed_packages_are_known() -> None:
    found = {package.name: package for package in packages()}
    assert found["torch"].version == metadata.version("torch")
    assert found["torch"].minimum == "2.10"
    assert {"triton", "vllm", "compressed-tensors"} <= found.keys()
    assert [package.problem for package in found.values() if package.problem] == []


def test_a_missing_or_old_package_is_a_problem_only_where_it_is_needed() -> None:
    assert Package("torch", None, "2.10", ()).problem == "torch: expected 2.10 or later, found none"
    assert Package("torch", "2.9.1", "2.10", ()).problem == "torch: expected 2.10 or later, found 2.9.1"
    assert Package("torch", "2.10", "2.10", ()).problem == ""
    assert Package("vllm", None, "", ()).problem == ""


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.python_problem() == ""
    monkeypatch.setattr(versions, "MINIMUM_PYTHON", (9, 0))
    assert versions.python_problem().startswith("python: expected 9.0 or later, found 3.")


def test_a_tree_that_is_not_installed_has_no_minimums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-distribution-of-ours")
    assert [package.name for package in packages()] == list(versions.OPTIONAL)
