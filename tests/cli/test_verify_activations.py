"""verify --activations: what engines round at run time, in the comparison of a source with its quantized copy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.consumers.cases import Case, quantized


@pytest.mark.parametrize(("scheme", "differs"), [("int8", True), ("int8-weight-only", False)])
def test_as_served_rounds_the_inputs_of_layers_whose_config_says_so(
    scheme: str, differs: bool, tiny: Path, held_out: Path, tmp_path: Path, program: Callable
) -> None:
    folder = quantized(tiny, tmp_path / "q", Case(scheme, scheme), None)
    text = ("--against", str(tiny), "--text", str(held_out), "--num-tokens", "300", "--level", "logits", "--json")
    full, served = (
        json.loads(program("verify", str(folder), *text, "--activations", how).stdout)["result"]
        for how in ("full", "as-served")
    )
    kl = [report["logits"]["summary"]["kl_nats"]["estimate"]["mean"] for report in (full, served)]
    assert (kl[1] > 1.5 * kl[0]) is differs
    assert (kl[1] == kl[0]) is not differs
    unchecked = "activations quantized at run time"
    assert (unchecked in full["not_checked"]) is differs
    assert unchecked not in served["not_checked"]
    assert [report["run"]["activations"] for report in (full, served)] == ["full", "as-served"]


def test_the_protocol_says_so(tiny: Path, held_out: Path, program: Callable) -> None:
    text = ("--against", str(tiny), "--text", str(held_out), "--num-tokens", "50", "--level", "logits")
    done = program("verify", str(tiny), *text, "--activations", "as-served")
    assert "compute\tfloat32 on cpu, activations as-served" in done.stdout.splitlines()


def test_activations_without_a_text_are_refused(tiny: Path, program: Callable) -> None:
    done = program("verify", str(tiny), "--against", str(tiny), "--activations", "full")
    assert done.exit_code == 2
    assert "--activations: expected --level layers or logits or runtime or all" in done.stderr
