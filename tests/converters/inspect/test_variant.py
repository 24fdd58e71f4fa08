"""Derivatives of the released models, and what cannot be told apart."""

from pathlib import Path
from typing import Any

import pytest

from converters.config import Glm4MoeConfig
from converters.inspect.report import inspect_folder
from converters.inspect.variant import MtpFacts, Variant, detect_variant
from converters.schema import Role, expand
from tests.converters.inspect.fakes import config_of, official, plain

NO_MTP = MtpFacts(None, copies=False, own_file=False, tensors=0, bytes=0)
WITH_COPIES = MtpFacts(46, copies=True, own_file=False, tensors=404, bytes=1)
WITHOUT_COPIES = MtpFacts(92, copies=False, own_file=False, tensors=500, bytes=1)


def detect(model: str, mtp: MtpFacts, *, bias: bool = True, **changes: Any) -> Variant:
    config = Glm4MoeConfig.from_hf({**config_of(model), **changes})
    return detect_variant(config, mtp, has_correction_bias=bias)


@pytest.mark.parametrize(
    ("model", "mtp", "bias", "changes", "name", "differences"),
    [
        ("GLM-4.5-Air", WITH_COPIES, True, {}, "GLM-4.5-Air", ()),
        ("GLM-4.5-Air", NO_MTP, True, {}, "derivative of GLM-4.5-Air", ("no MTP layer",)),
        (
            "GLM-4.5-Air",
            NO_MTP,
            False,
            {"n_routed_experts": 96},
            "derivative of GLM-4.5-Air",
            ("n_routed_experts 96 instead of 128", "no MTP layer", "no correction bias"),
        ),
        ("GLM-4.7", WITH_COPIES, True, {}, "GLM-4.7", ()),
        ("GLM-4.7", WITHOUT_COPIES, True, {}, "GLM-4.6", ()),
        ("GLM-4.7", NO_MTP, True, {}, "derivative of GLM-4.6 or 4.7", ("no MTP layer",)),
        ("GLM-4.5", WITH_COPIES, True, {"max_position_embeddings": 65536}, "GLM-4.5, 4.6 or 4.7", ()),
        (
            "GLM-4.5",
            WITH_COPIES,
            True,
            {"num_hidden_layers": 80},
            "derivative of GLM-4.5",
            ("num_hidden_layers 80 instead of 92",),
        ),
        ("GLM-4.5", WITH_COPIES, True, {"hidden_size": 2048}, "custom", ()),
    ],
)
def test_variant(
    model: str, mtp: MtpFacts, bias: bool, changes: dict[str, Any], name: str, differences: tuple[str, ...]
) -> None:
    found = detect(model, mtp, bias=bias, **changes)
    assert (found.name, found.differences) == (name, differences)


def test_a_pruned_derivative_has_its_published_size(tmp_path: Path) -> None:
    """96 experts, no MTP layer, no correction bias: 81,932,181,504 parameters on the hub."""
    config = {**config_of("GLM-4.5-Air"), "n_routed_experts": 96}
    schema = expand(Glm4MoeConfig.from_hf(config), mtp=False)
    biases = {tensor.name for tensor in schema.tensors.values() if tensor.spec.role is Role.ROUTER_BIAS}
    stored = {name: value for name, value in plain(schema).items() if name not in biases}
    report = inspect_folder(official(tmp_path / "reap", config, stored=stored), "reap")
    assert report.model is not None
    assert report.model.totals.parameters == report.model.totals.expected_parameters == 81_932_181_504
    assert report.model.totals.bytes == report.model.totals.expected_bytes
    assert [finding.check.number for finding in report.findings] == [205, 302]
    assert report.fatal == ()
    assert report.missing == {}
    assert report.model.variant.differences == (
        "n_routed_experts 96 instead of 128",
        "no MTP layer",
        "no correction bias",
    )
