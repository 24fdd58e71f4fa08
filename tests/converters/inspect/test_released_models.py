"""The released models at full size, as headers: sizes equal to the published ones, to the byte."""

from pathlib import Path

import pytest

from converters.config import Glm4MoeConfig
from converters.inspect.report import InspectReport, inspect_folder
from converters.schema import Role, expand
from tests.converters.inspect.fakes import config_of, official, per_channel, quantized_config

# main parameters, MTP parameters, total, tensors of the main model, tensors, bytes; from the hub's own listing
PUBLISHED = {
    "GLM-4.5": (352797829024, 5539962272, 358337791296, 44189, 44691, 716675611392),
    "GLM-4.6": (352797829024, 3988069792, 356785898816, 44189, 44689, 713571826432),
    "GLM-4.7": (352797829024, 5539962272, 358337791296, 44189, 44691, 716675611392),
    "GLM-4.5-Air": (106852251264, 3616573568, 110468824832, 17925, 18329, 220937661440),
}
STYLES = {
    "GLM-4.5": "layer 92, with its own embedding and head, in the main files",
    "GLM-4.6": "layer 92, without embedding and head, in the main files",
    "GLM-4.7": "layer 92, with its own embedding and head, in mtp.safetensors",
    "GLM-4.5-Air": "layer 46, with its own embedding and head, in the main files",
}


@pytest.fixture(scope="module", params=PUBLISHED)
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InspectReport:
    name = request.param
    folder = tmp_path_factory.mktemp("released") / name
    official(folder, config_of(name), mtp_copies=name != "GLM-4.6", mtp_file=name == "GLM-4.7")
    report = inspect_folder(folder, name)
    for path in folder.iterdir():
        path.unlink()
    return report


def test_released_model_is_recognised_and_has_no_findings(released: InspectReport) -> None:
    assert released.model is not None
    assert released.model.variant.name == released.label
    assert released.model.variant.differences == ()
    assert released.model.mtp.style == STYLES[released.label]
    assert released.findings == ()
    assert released.missing == {}
    assert released.unexpected == ()
    assert released.model.quantization.scheme == "none"


def test_released_model_has_the_published_sizes(released: InspectReport) -> None:
    assert released.model is not None
    totals, mtp = released.model.totals, released.model.mtp
    main, mtp_parameters, parameters, main_tensors, tensors, nbytes = PUBLISHED[released.label]
    assert (totals.main_parameters, totals.mtp_parameters, totals.parameters) == (main, mtp_parameters, parameters)
    assert (totals.tensors - mtp.tensors, totals.tensors, totals.bytes) == (main_tensors, tensors, nbytes)
    assert (totals.expected_parameters, totals.expected_tensors, totals.expected_bytes) == (parameters, tensors, nbytes)
    assert sum(totals.parameters_by_role.values()) == totals.elements == parameters


def test_released_model_has_the_published_active_parameters_and_cache(released: InspectReport) -> None:
    assert released.model is not None
    totals, is_air = released.model.totals, released.label == "GLM-4.5-Air"
    assert round(totals.active_parameters / 1e9, 2) == (13.42 if is_air else 33.63)
    assert round(totals.active_parameters_without_embedding / 1e9, 2) == (12.80 if is_air else 32.86)
    assert totals.kv_bytes_per_token == 4096 * (46 if is_air else 92)
    assert totals.kv_bytes_per_token_fp8 == 2048 * (46 if is_air else 92)
    assert round(totals.bits_per_weight, 4) == 16.0


def test_evidence_tells_45_46_and_47_apart(released: InspectReport) -> None:
    assert released.model is not None
    large = "hidden_size 5120, 92 layers, 160 experts"
    longer = "max_position_embeddings 202752: 4.5 has 131072"
    assert (
        released.model.variant.evidence
        == {
            "GLM-4.5": (large, "max_position_embeddings 131072: 4.6 and 4.7 have 202752"),
            "GLM-4.6": (large, longer, "MTP layer without embedding and head: 4.7 has both"),
            "GLM-4.7": (
                large,
                longer,
                "MTP layer with its own embedding and head, in mtp.safetensors as published: 4.6 has neither",
            ),
            "GLM-4.5-Air": ("hidden_size 4096, 46 layers, 128 experts", "max_position_embeddings 131072"),
        }[released.label]
    )


# the head of Air's MTP layer is quantized, that of 4.7 is not; sizes from the hub's listing, 4.7's with its scales
@pytest.mark.parametrize(
    ("name", "also", "nbytes", "elements", "findings"),
    [
        ("GLM-4.5-Air", [Role.MTP_HEAD], 112558098944, None, [404]),
        ("GLM-4.7", [], 362052508416, 358458391872, []),
    ],
)
def test_official_fp8_release_has_its_published_size(
    tmp_path: Path, name: str, also: list[Role], nbytes: int, elements: int | None, findings: list[int]
) -> None:
    config = config_of(name)
    schema = expand(Glm4MoeConfig.from_hf(config))
    stored = per_channel(schema, "F32", also)
    official(tmp_path / "fp8", quantized_config(config, schema, also), stored=stored)
    report = inspect_folder(tmp_path / "fp8", f"{name}-FP8")
    assert report.model is not None
    assert report.model.totals.bytes == nbytes
    assert elements is None or report.model.totals.elements == elements
    assert [finding.check.number for finding in report.findings] == findings
    quantization = report.model.quantization
    assert (quantization.scheme, quantization.dialect, quantization.group_size) == ("fp8", "compressed-tensors", 1)
    assert quantization.modules == sum(dtype == "F8_E4M3" for dtype, _ in stored.values())
    assert quantization.evidence == (
        f"{quantization.modules} weights stored as fp8: F8_E4M3 [N, K], scale F32 [N, 1]",
        "quantization_config quant_method compressed-tensors",
        "quantization_config format float-quantized",
    )
    assert sum(row.tensors for row in report.census) == len(stored)
    assert report.census[0].dtype == "F8_E4M3"
    assert report.model.variant.name == name
