"""The certificate: every data-free format passes as written, and every way to spoil it is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import random_tensors
from quantized_from import MAKERS, SCHEMA, Maker, write_pair

from converters.convert import ConvertOptions, plan_convert
from converters.errors import ResourceError
from converters.findings import Severity
from converters.job import run
from converters.layout import Layout
from converters.numerics import fp8, nvfp4
from converters.pipeline import RunOptions
from converters.quant.certificate import Certificate, Relation
from converters.quant.certify import CertifyOptions, certify_folders
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.schema import DtypePolicy, Role
from converters.source import open_source

Stored = dict[str, torch.Tensor]
Change = Callable[[Stored], object]


def certify(source: Path, candidate: Path, **options: int) -> Certificate:
    return certify_folders(source, candidate, CertifyOptions(**options), lambda total: lambda done: None)


def module(role: Role, part: str, layer: int = 1, expert: int | None = None) -> str:
    return SCHEMA.tensor(role, part, layer, expert).module


UP = module(Role.EXPERT, "up_proj.weight", 1, 2)
OTHER_UP = module(Role.EXPERT, "up_proj.weight", 1, 3)
DOWN = module(Role.EXPERT, "down_proj.weight", 1, 2)
QUERY = module(Role.ATTENTION, "q_proj.weight")
CODES = {"weight", "weight_packed"}


def codes_of(stored: Stored, name: str) -> str:
    return next(f"{name}.{suffix}" for suffix in ("weight_packed", "weight") if f"{name}.{suffix}" in stored)


def scale_of(stored: Stored, name: str) -> str:
    return next(f"{name}.{suffix}" for suffix in ("weight_scale", "weight_scale_inv") if f"{name}.{suffix}" in stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", MAKERS)
def test_what_a_writer_makes_is_certified(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    found = certify(*write_pair(tmp_path, MAKERS[name], dtype=dtype))
    assert [str(finding) for finding in found.findings] == []
    assert len(found.tensors) == len(SCHEMA.tensors)
    rounded = [figures for figures in found.tensors if figures.relation is Relation.ROUNDED]
    assert rounded
    assert all(figures.scales for figures in rounded)
    low, high = (0.06, 0.12) if "nvfp4" in name else (0.02, 0.03) if "fp8" in name else (0.002, 0.012)
    assert all(low < figures.relative_error < high for figures in rounded)
    assert all(abs(figures.slope - 1) < 0.02 for figures in rounded)


def bump(stored: Stored, name: str, row: int = 3, byte: int = 5) -> None:
    """Make one code the next one, on the side that is farther from where it was."""
    codes = stored[codes_of(stored, name)].view(torch.uint8)
    codes[row, byte] = int(codes[row, byte]) ^ 1


def swap_nibbles(stored: Stored) -> None:
    codes = stored[codes_of(stored, UP)]
    rows = codes[4].clone()
    swapped = (rows >> 4) | (rows << 4)
    column = int((rows != swapped).nonzero()[0])
    codes[4, column] = swapped[column]


def exchange_experts(stored: Stored) -> None:
    mine = [name for name in stored if name.startswith(f"{UP}.")]
    for name in mine:
        other = name.replace(UP, OTHER_UP)
        stored[name], stored[other] = stored[other], stored[name]


def exchange_rows(stored: Stored) -> None:
    name = codes_of(stored, UP)
    stored[name][[2, 7]] = stored[name][[7, 2]].clone()
    scale = stored[scale_of(stored, UP)]
    if len(scale.shape) and scale.shape[0] == len(stored[name]):
        scale[[2, 7]] = scale[[7, 2]].clone()


def scale_by(factor: float) -> Change:
    def change(stored: Stored) -> None:
        scale = stored[scale_of(stored, UP)]
        flat = scale.view(-1).float()
        # of several scales one, that of weights
        flat[len(flat) // 2] *= factor
        stored[scale_of(stored, UP)] = flat.to(scale.dtype).view(scale.shape)

    return change


DAMAGES: dict[str, Change] = {
    "one code off by one": lambda stored: bump(stored, UP),
    "the last code off by one": lambda stored: bump(stored, UP, -1, -1),
    "exchanged experts": exchange_experts,
    "exchanged rows": exchange_rows,
    "a scale twice as large": scale_by(2.0),
    "a scale half as large": scale_by(0.5),
    "a scale of the next code": scale_by(1.13),
    "a negative scale": scale_by(-1.0),
}


# another arithmetic changes what a code may be, and nothing else; where the code lies does not matter to it
@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in MAKERS for damage in DAMAGES if "," not in name or damage == "one code off by one"],
)
def test_damage_is_found_in_every_format(tmp_path: Path, name: str, damage: str) -> None:
    found = certify(*write_pair(tmp_path, MAKERS[name], DAMAGES[damage]))
    assert found.findings
    damaged = {UP, OTHER_UP} if "experts" in damage else {UP}
    # scales that are one value each have findings of their own
    subjects = {finding.subject for finding in found.findings if "_scale" not in finding.subject}
    assert subjects == {f"candidate: tensor {name}.weight" for name in damaged}


@pytest.mark.parametrize("name", [name for name in MAKERS if "nvfp4" in name])
def test_a_swapped_nibble_is_found(tmp_path: Path, name: str) -> None:
    found = certify(*write_pair(tmp_path, MAKERS[name], swap_nibbles))
    (finding,) = found.findings
    assert "the first at row 4" in finding.found


@pytest.mark.parametrize("name", [name for name in MAKERS if "nvfp4" in name])
def test_an_inverted_global_scale_is_found(tmp_path: Path, name: str) -> None:
    suffix = "weight_scale_2" if "modelopt" in name else "weight_global_scale"

    def invert(stored: Stored) -> None:
        stored[f"{UP}.{suffix}"] = stored[f"{UP}.{suffix}"].reciprocal()

    found = certify(*write_pair(tmp_path, MAKERS[name], invert))
    *wrong, unequal = found.findings
    assert {finding.subject for finding in wrong} == {f"candidate: tensor {UP}.weight"}
    assert unequal.expected == "one value"
    (worst, *_) = found.worst
    assert worst.tensor == f"{UP}.weight"
    assert worst.relative_error > 0.9


def test_a_code_without_value_is_found(tmp_path: Path) -> None:
    def spoil(stored: Stored) -> None:
        stored[f"{UP}.weight"].view(torch.uint8)[0, 0] = 0x7F

    found = certify(*write_pair(tmp_path, MAKERS["ct-fp8-channel"], spoil))
    (finding,) = found.findings
    assert "at row 0, column 0" in finding.found
    assert finding.found.endswith("became nan")


def test_a_plain_tensor_that_changed_is_found(tmp_path: Path) -> None:
    gate = SCHEMA.tensor(Role.ROUTER, "gate.weight", 1).name

    def spoil(stored: Stored) -> None:
        stored[gate].view(torch.int16)[1, 2] ^= 1

    found = certify(*write_pair(tmp_path, MAKERS["ct-fp8-channel"], spoil))
    (finding,) = found.findings
    assert finding.subject == f"candidate: tensor {gate}"
    assert finding.expected == "the bits of the source"
    assert "1 of 256 elements are not, the first at row 1, column 2" in finding.found


@pytest.mark.parametrize("workers", [1, 3])
def test_result_does_not_depend_on_workers_or_blocks(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-fp8-block"])
    whole = certify(source, copy, workers=2)
    monkeypatch.setattr("converters.quant.judge.BLOCK_ELEMENTS", 64)
    assert certify(source, copy, workers=workers) == whole


def convert(source: Path, to: Path, **options: object) -> Path:
    with open_source(source) as opened:
        run(plan_convert(opened, ConvertOptions(**options)), to, RunOptions(2), lambda _: None)  # type: ignore[arg-type]
    return to


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED_SHARED, Layout.FUSED])
def test_both_sides_may_have_any_layout(tmp_path: Path, layout: Layout) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-int8-channel"])
    there = convert(copy, tmp_path / "there", layout=layout)
    assert certify(source, there).findings == ()
    packed = convert(source, tmp_path / "packed", layout=Layout.PACKED)
    assert certify(packed, there).tensors == certify(source, copy).tensors


def test_codes_that_were_repacked_are_compared(tmp_path: Path) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-nvfp4"])
    packed = convert(copy, tmp_path / "packed", layout=Layout.PACKED)
    found = certify(copy, packed)
    assert found.findings == ()
    assert {figures.relation for figures in found.tensors} == {Relation.EQUAL}
    assert certify(source, packed).findings == ()


@pytest.mark.parametrize("name", MAKERS)
def test_dequantized_weights_are_compared(tmp_path: Path, name: str) -> None:
    _, copy = write_pair(tmp_path, MAKERS[name])
    plain = convert(copy, tmp_path / "plain", dequantize=True)
    found = certify(copy, plain)
    assert found.findings == ()
    assert Relation.DEQUANTIZED in {figures.relation for figures in found.tensors}


def test_a_cast_is_compared(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path, MAKERS["ct-nvfp4"], dtype=torch.float32)
    narrow = convert(source, tmp_path / "narrow", dtype="bfloat16")
    found = certify(source, narrow)
    assert found.findings == ()
    wrong = convert(source, tmp_path / "wrong", dtype="float16")
    (name, *_) = random_tensors(SCHEMA)
    bits = certify(narrow, wrong)
    assert name in {finding.subject.split()[-1] for finding in bits.findings}


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-fp8-channel"])
    with pytest.raises(ResourceError, match="--max-memory: expected at least"):
        certify(source, copy, workers=2, max_memory=1 << 12)


def with_scale(by: float) -> Maker:
    """FP8 whose scale of one weight is wrong and whose codes follow it: every element is within half a step."""

    def make(weight: torch.Tensor, largest: torch.Tensor) -> Stored:
        _, scale = fp8.quantize_channel(weight, Arithmetic.FLOAT32)
        wrong = (scale.float() * by).to(scale.dtype)
        return {"weight": (weight.float() / wrong.float()).to(torch.float8_e4m3fn), "weight_scale": wrong}

    return Maker(MAKERS["ct-fp8-channel"].config, make)


def test_a_scale_that_all_codes_follow_is_found(tmp_path: Path) -> None:
    found = certify(*write_pair(tmp_path, with_scale(2.0)))
    assert all("scales are not, the first" in finding.found for finding in found.findings)
    assert len(found.findings) == sum(
        tensor.spec.dtype is DtypePolicy.QUANTIZABLE for tensor in SCHEMA.tensors.values()
    )


def test_a_global_scale_that_all_codes_follow_is_found(tmp_path: Path) -> None:
    """Twice the global scale: local scales saturate or halve, and codes follow."""

    def make(weight: torch.Tensor, largest: torch.Tensor) -> Stored:
        codes, local, whole = nvfp4.quantize_nvfp4(weight, largest * 2, Arithmetic.FLOAT32, ScaleSearch.NONE)
        return {"weight_packed": codes, "weight_scale": local, "weight_global_scale": whole.view(1)}

    found = certify(*write_pair(tmp_path, Maker(MAKERS["ct-nvfp4"].config, make)))
    assert "for the whole tensor, whose group has a magnitude of" in found.findings[0].found


def test_scales_of_single_weights_of_a_fused_group_are_found(tmp_path: Path) -> None:
    """Each maps its own magnitude to the range, and engines would take one of them for all."""

    def make(weight: torch.Tensor, largest: torch.Tensor) -> Stored:
        return MAKERS["ct-nvfp4"].make(weight, weight.float().abs().max().view(1, 1))

    found = certify(*write_pair(tmp_path, Maker(MAKERS["ct-nvfp4"].config, make)))
    assert {(finding.severity, finding.expected) for finding in found.findings} == {(Severity.FAIL, "one value")}
    assert any(f"{QUERY}.weight_global_scale" in finding.subject for finding in found.findings)


@pytest.mark.parametrize(("value", "severity"), [(1.0, "warn"), (0.0, "fail"), (float("nan"), "fail")])
def test_an_input_scale_that_was_never_computed_is_found(tmp_path: Path, value: float, severity: str) -> None:
    def change(stored: Stored) -> None:
        for name in [name for name in stored if name.endswith("weight_global_scale")]:
            stored[name.replace("weight_global", "input_global")] = torch.tensor([20.0])
        stored[f"{DOWN}.input_global_scale"] = torch.tensor([value])

    (finding,) = certify(*write_pair(tmp_path, MAKERS["ct-nvfp4"], change)).findings
    assert (finding.severity, finding.subject) == (severity, f"candidate: tensor {DOWN}.input_global_scale")


def manifest_of(copy: Path, **transform: str) -> None:
    """Put a manifest beside a checkpoint that says how its weights were made."""
    with open_source(copy) as opened:
        tensors = {
            name: {
                "file": opened.reader.index.entries[name][0],
                "dtype": "",
                "shape": [],
                "sha256": "",
                "source_digest": "",
                "transform": transform,
                "sources": [],
            }
            for name in opened.reader.names
        }
        shards = {file: {"bytes": 0} for file in opened.reader.index.files}
    job = {"source": "", "version": ""}
    manifest = {"schema": "glm4moe.manifest/2", "job": job, "shards": shards, "files": {}, "tensors": tensors}
    (copy / "glm4moe-manifest.json").write_text(json.dumps(manifest))


def test_searched_scales_are_wrong_where_none_were_to_be_searched(tmp_path: Path) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-nvfp4, searched"])
    assert certify(source, copy).findings == ()
    manifest_of(copy, name="nvfp4", search="mse")
    assert certify(source, copy).findings == ()
    manifest_of(copy, name="nvfp4", search="none")
    assert certify(source, copy).findings


def test_codes_chosen_by_gptq_are_held_to_slope_and_scales_only(tmp_path: Path) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-int8-channel"], lambda stored: bump(stored, UP))
    assert certify(source, copy).findings
    manifest_of(copy, name="int8 gptq")
    found = certify(source, copy)
    assert found.findings == ()
    assert Relation.GRID in {figures.relation for figures in found.tensors}


def test_a_global_scale_of_one_is_right_for_a_magnitude_of_2688(tmp_path: Path) -> None:
    def change(stored: Stored) -> None:
        stored[f"{UP}.weight_global_scale"] = torch.ones(1)

    tensors = random_tensors(SCHEMA)
    tensors[f"{UP}.weight"][1, 2] = 2688.0
    assert certify(*write_pair(tmp_path / "a", MAKERS["ct-nvfp4"], change, tensors=tensors)).findings == ()
    assert certify(*write_pair(tmp_path / "b", MAKERS["ct-nvfp4"], change)).findings
