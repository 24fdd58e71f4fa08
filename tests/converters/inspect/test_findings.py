"""Every finding of the catalog planted once in a clean checkpoint: it is reported, with its number, and no other is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import fp8_channel_config, random_tensors, small_config, write_checkpoint

from converters.checkpoint.header import read_header
from converters.config import Glm4MoeConfig
from converters.errors import SecurityError
from converters.findings import Severity
from converters.hub.listing import ListedFile, Listing, write_listing
from converters.inspect import catalog
from converters.inspect.catalog import Check
from converters.inspect.report import InspectReport, inspect_folder, scan_content
from converters.schema import DtypePolicy, Role, expand
from tests.converters.inspect.layouts import Tensors, packed, quantize

CONFIG = small_config()
SCHEMA = expand(Glm4MoeConfig.from_hf(CONFIG))
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = random_tensors(SCHEMA)
DOWN = SCHEMA.tensor(Role.EXPERT, "down_proj.weight", 1, 2).name
BIAS = SCHEMA.tensor(Role.ROUTER_BIAS, "gate.e_score_correction_bias", 1).name
BIASES = [tensor.name for tensor in SCHEMA.tensors.values() if tensor.spec.role is Role.ROUTER_BIAS]
NORM = SCHEMA.tensor(Role.NORM, "input_layernorm.weight", 0).name
MTP = [tensor.name for tensor in SCHEMA.tensors.values() if tensor.layer == SCHEMA.mtp_layer]
EH = SCHEMA.tensor(Role.MTP_PROJECTION, "eh_proj.weight", SCHEMA.mtp_layer).name
Q = SCHEMA.tensor(Role.ATTENTION, "q_proj.weight", 0).name
QUANTIZABLE = [tensor.name for tensor in SCHEMA.tensors.values() if tensor.spec.dtype is DtypePolicy.QUANTIZABLE]
MATRICES = [tensor for tensor in SCHEMA.tensors.values() if len(tensor.shape) > 1]
IGNORE = [tensor.module for tensor in MATRICES if tensor.name not in QUANTIZABLE]
FP8_CONFIG = {**CONFIG, "quantization_config": fp8_channel_config(IGNORE)}
FP8 = quantize(TENSORS, QUANTIZABLE)
Q_SCALE = Q.removesuffix("weight") + "weight_scale"


def report_of(folder: Path) -> InspectReport:
    report = inspect_folder(folder, "CKPT")
    return scan_content(report, want_hash=False, want_values=True, on_bytes=lambda _: None)


def found(report: InspectReport) -> list[tuple[int, str, str, str]]:
    return [(f.check.number, f.subject, f.expected, f.found) for f in report.findings]


def write(folder: Path, tensors: Tensors, config: dict | None = None) -> Path:
    return write_checkpoint(folder, tensors, CONFIG if config is None else config)


def without(*names: str) -> Tensors:
    return {name: value for name, value in TENSORS.items() if name not in names}


def test_a_clean_checkpoint_has_no_findings(tmp_path: Path) -> None:
    assert found(report_of(write(tmp_path / "a", TENSORS))) == []
    assert found(report_of(write(tmp_path / "b", FP8, FP8_CONFIG))) == []
    assert found(report_of(write_checkpoint(tmp_path / "c", TENSORS, CONFIG, 1))) == []


def test_the_trained_fixture_has_no_findings(tiny: Path) -> None:
    report = report_of(tiny)
    assert found(report) == []
    assert report.model is not None
    assert report.model.totals.expected_bytes == report.model.totals.bytes
    assert report.model.variant.name == "custom"


# what is done to the tensors -> the findings
DAMAGED_TENSORS: dict[str, tuple[Tensors, list[tuple[int, str, str, str]]]] = {
    "tensor missing": (
        without(DOWN, NORM),
        [
            (201, "layer 0", "all 14 tensors", f"{NORM} missing"),
            (201, "layer 1", "all 28 tensors", f"{DOWN} missing"),
        ],
    ),
    "layer missing": (
        {name: value for name, value in TENSORS.items() if ".layers.1." not in name},
        [(202, "layer 1", "all 28 tensors", "none of them")],
    ),
    "layer beyond the config": (
        {**TENSORS, NORM.replace(".0.", ".7."): TENSORS[NORM]},
        [(203, "layer 7", "layers 0 to 3, as config.json says", NORM.replace(".0.", ".7."))],
    ),
    "unknown name": (
        {**TENSORS, "model.visual.weight": TENSORS[NORM]},
        [(204, "names", "names that GLM-4 MoE checkpoints have", "model.visual.weight")],
    ),
    "tensor that the config does not ask for": (
        {**TENSORS, DOWN.replace(".2.down", ".9.down"): TENSORS[DOWN]},
        [(204, "config.json", "only tensors that the config asks for", DOWN.replace(".2.down", ".9.down"))],
    ),
    "no correction bias": (
        without(*BIASES),
        [(205, "routers", "a correction bias in each MoE layer", "none in any")],
    ),
    "wrong shape": (
        {**TENSORS, DOWN: TENSORS[DOWN].T.contiguous()},
        [(206, f"tensor {DOWN}", "[48, 24], from config.json", "[24, 48]")],
    ),
    "wrong dtype": (
        {**TENSORS, NORM: torch.ones(48, dtype=torch.int16).cumsum(0).short()},
        [(207, f"tensor {NORM}", "BF16 or F16 or F32", "I16")],
    ),
    "correction bias not fp32": (
        {**TENSORS, BIAS: TENSORS[BIAS].bfloat16()},
        [(208, f"tensor {BIAS}", "F32", "BF16")],
    ),
    "MTP layer incomplete": (without(EH), [(301, "MTP layer 3", "all 34 tensors", f"{EH} missing")]),
    "MTP layer absent": (
        without(*MTP),
        [(302, "MTP layer", "present, as num_nextn_predict_layers says", "no tensor of it")],
    ),
    "NaN": (
        {**TENSORS, DOWN: TENSORS[DOWN].index_fill(0, torch.tensor([5]), float("nan"))},
        [(501, f"tensor {DOWN}", "finite values", "NaN or Inf at row 5, column 0")],
    ),
    "Inf": (
        {**TENSORS, NORM: TENSORS[NORM].index_fill(0, torch.tensor([9]), float("-inf"))},
        [(501, f"tensor {NORM}", "finite values", "NaN or Inf at element 9")],
    ),
    "all zero": (
        {**TENSORS, DOWN: torch.zeros_like(TENSORS[DOWN])},
        [(502, f"tensor {DOWN}", "trained values", "zeros")],
    ),
    "constant": (
        {**TENSORS, DOWN: torch.full_like(TENSORS[DOWN], 0.5)},
        [(503, f"tensor {DOWN}", "trained values", "one value")],
    ),
    "constant vector": (
        {**TENSORS, NORM: torch.ones_like(TENSORS[NORM]), BIAS: torch.zeros_like(TENSORS[BIAS])},
        [
            (504, f"tensor {NORM}", "trained values", "one value"),
            (504, f"tensor {BIAS}", "trained values", "zeros"),
        ],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_damaged_tensors_are_found(tmp_path: Path, damage: str) -> None:
    tensors, expected = DAMAGED_TENSORS[damage]
    assert sorted(found(report_of(write(tmp_path / "a", tensors)))) == sorted(expected)


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


SECOND_COUNT = len(TENSORS) // 2
# what is done to the folder -> number, subject, and the start of what was found
DAMAGED_FOLDERS: dict[str, tuple[Callable[[Path], object], list[tuple[int, str, str]]]] = {
    "state of a run": (
        lambda folder: (folder / ".glm4moe").mkdir(),
        [(101, "folder", ".glm4moe, the state of a run that has not ended")],
    ),
    "partial file": (
        lambda folder: (folder / f".{FIRST}.partial").touch(),
        [(101, "folder", f".{FIRST}.partial, a file that is only partly written")],
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), [(101, "folder", f"2 safetensors files without {INDEX}")]),
    "no config": (lambda folder: (folder / "config.json").unlink(), [(102, "config.json", "none")]),
    "index is no JSON": (lambda folder: (folder / INDEX).write_text("{"), [(104, INDEX, "Expecting property name")]),
    "index without weight_map": (
        lambda folder: edit_index(folder, lambda index: index.pop("weight_map")),
        [(104, INDEX, "none")],
    ),
    "file missing": (lambda folder: (folder / SECOND).unlink(), [(105, SECOND, "none")]),
    "file cut off": (lambda folder: cut(folder / SECOND), [(106, SECOND, "")]),
    "file empty": (lambda folder: (folder / SECOND).write_bytes(b""), [(106, SECOND, "0")]),
    "index names the wrong file": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].update({NORM: SECOND})),
        [(107, SECOND, f"{NORM} in {FIRST}")],
    ),
    "index lists a tensor that is not there": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].update({"model.ghost.weight": SECOND})),
        [(107, SECOND, "model.ghost.weight in no file")],
    ),
    "index forgot a tensor": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].pop(NORM)),
        [(107, FIRST, f"{NORM}, which it does not list")],
    ),
    "file not in the index": (
        lambda folder: (folder / "old.safetensors").write_bytes((folder / SECOND).read_bytes()),
        [(109, "old.safetensors", "one that is not named")],
    ),
    "total_size": (
        lambda folder: edit_index(folder, lambda index: index["metadata"].update(total_size=7)),
        [(110, INDEX, "7")],
    ),
    "code": (lambda folder: (folder / "modeling.py").touch(), [(111, "modeling.py", "modeling.py")]),
}


@pytest.mark.parametrize("damage", DAMAGED_FOLDERS)
def test_damaged_folders_are_found(tmp_path: Path, damage: str) -> None:
    act, expected = DAMAGED_FOLDERS[damage]
    folder = write(tmp_path / "a", TENSORS)
    act(folder)
    got = found(report_of(folder))
    # without an index all files are read, and the index itself is the only finding
    got = [finding for finding in got if finding[0] != 101] if damage.startswith("index is") else got
    assert [(number, subject) for number, subject, _, _ in got] == [
        (number, subject) for number, subject, _ in expected
    ]
    assert all(text.startswith(start) for (_, _, _, text), (_, _, start) in zip(got, expected, strict=True)), got


def test_a_download_is_unfinished_until_all_listed_files_are_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TENSORS)
    (folder / ".glm4moe").mkdir()
    listed = tuple(ListedFile(path.name, path.stat().st_size, "0" * 64) for path in folder.iterdir() if path.is_file())
    listing = Listing("acme/model", "main", "0" * 40, listed)
    write_listing(folder, listing)
    assert found(report_of(folder)) == []
    write_listing(folder, replace(listing, files=(*listed, ListedFile("tokenizer.json", 7, "0" * 40))))
    text = "1 of 7 files still to be downloaded, the first tokenizer.json"
    assert found(report_of(folder)) == [(101, "folder", "a finished checkpoint", text)]
    (folder / "tokenizer.json").write_text("{}")
    assert found(report_of(folder))[0][3] == text
    (folder / ".glm4moe" / "listing.json").write_text("{}")
    assert found(report_of(folder))[0][3].startswith("a record of the download that is damaged")


def test_a_finished_conversion_that_left_its_state_is_finished(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TENSORS)
    (folder / ".glm4moe").mkdir()
    (folder / "glm4moe-manifest.json").write_text("{}")
    assert found(report_of(folder)) == []


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TENSORS)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    numbers = {finding.check.number for finding in inspect_folder(folder, "CKPT").findings}
    assert {103, 202} <= numbers


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TENSORS)
    second = {entry.name for entry in read_header(folder / SECOND)}
    both = {**{name: TENSORS[name] for name in second}, NORM: TENSORS[NORM]}
    write_checkpoint(tmp_path / "b", both, CONFIG, 1)
    (folder / SECOND).write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    assert (108, f"tensor {NORM}", "one file", f"both {FIRST} and {SECOND}") in found(report_of(folder))


def test_missing_tensors_of_a_lost_file_are_listed_with_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TENSORS)
    names = [entry.name for entry in read_header(folder / SECOND)]
    (folder / SECOND).unlink()
    assert report_of(folder).missing == dict.fromkeys(names, SECOND)


def test_unlisted_mtp_file_is_taken_in(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", without(*MTP))
    write_checkpoint(tmp_path / "b", {name: TENSORS[name] for name in MTP}, CONFIG, 1)
    (tmp_path / "b" / "model.safetensors").rename(folder / "mtp.safetensors")
    report = report_of(folder)
    assert [(number, subject) for number, subject, _, _ in found(report)] == [
        (109, "mtp.safetensors"),
        (110, INDEX),
    ]
    assert report.model is not None
    assert report.model.mtp.style == "layer 3, with its own embedding and head, in mtp.safetensors"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd.safetensors", ".hidden.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "a", TENSORS)
    edit_index(folder, lambda index: index["weight_map"].update({NORM: name}))
    with pytest.raises(SecurityError):
        inspect_folder(folder, "CKPT")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TENSORS)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(SecurityError, match="a pickled file"):
        inspect_folder(folder, "CKPT")


def with_rule(**changes: object) -> dict:
    return {**CONFIG, "quantization_config": {**FP8_CONFIG["quantization_config"], **changes}}


GATE = SCHEMA.tensor(Role.ROUTER, "gate.weight", 1)
DAMAGED_QUANTIZATION: dict[str, tuple[Tensors, dict, list[tuple[int, str, str, str]]]] = {
    "method unknown": (
        FP8,
        with_rule(quant_method="gguf"),
        [(401, "quantization_config.quant_method", "compressed-tensors, fp8 or modelopt", "'gguf'")],
    ),
    "codes but no config": (
        FP8,
        CONFIG,
        [
            (
                402,
                "config.json",
                "plain weights: it has no quantization_config",
                f"codes in {QUANTIZABLE[0]}, and {len(QUANTIZABLE) - 1} more",
            )
        ],
    ),
    "one module plain": (
        {**{name: value for name, value in FP8.items() if name != Q_SCALE}, Q: TENSORS[Q]},
        FP8_CONFIG,
        [(402, f"tensor {Q}", "codes and a scale, as quantization_config says", "BF16")],
    ),
    "one module quantized that is ignored": (
        FP8,
        with_rule(ignore=[*IGNORE, SCHEMA.tensors[Q].module]),
        [
            (
                402,
                f"tensor {Q}",
                "plain weights, as quantization_config says",
                "F8_E4M3 [N, K], scale F32 [N, 1]",
            )
        ],
    ),
    "scale of the wrong shape": (
        {**FP8, Q_SCALE: FP8[Q_SCALE][:5].contiguous()},
        FP8_CONFIG,
        [
            (
                402,
                f"tensor {Q}",
                "parts of a declared scheme (fp8 per channel)",
                "weight F8_E4M3 [96, 48], weight_scale F32 [5, 1]",
            )
        ],
    ),
    "scale missing": (
        {name: value for name, value in FP8.items() if name != Q_SCALE},
        FP8_CONFIG,
        [(403, f"tensor {Q}", "a scale beside its codes", "none")],
    ),
    "scale of a plain weight": (
        {**TENSORS, Q_SCALE: FP8[Q_SCALE]},
        CONFIG,
        [(403, f"tensor {Q}", "no scale beside a plain weight", "weight_scale")],
    ),
    "codes missing": (
        {name: value for name, value in FP8.items() if name != Q},
        FP8_CONFIG,
        [(403, f"tensor {Q}", "codes or a plain weight beside its scales", "only weight_scale")],
    ),
    "eh_proj quantized": (
        quantize(FP8, [EH]),
        with_rule(ignore=[name for name in IGNORE if name != SCHEMA.tensors[EH].module]),
        [(404, f"tensor {EH}", "plain weights", "F8_E4M3 [N, K], scale F32 [N, 1]")],
    ),
    "router not ignored": (
        FP8,
        with_rule(ignore=[name for name in IGNORE if name != GATE.module]),
        [(405, "quantization_config.ignore", GATE.module, "no such entry")],
    ),
    "scale zero": (
        {**FP8, Q_SCALE: FP8[Q_SCALE].index_fill(0, torch.tensor([3]), 0.0)},
        FP8_CONFIG,
        [(506, f"tensor {Q_SCALE}", "positive, finite scales", "a zero, negative or undefined one")],
    ),
    "scale infinite": (
        {**FP8, Q_SCALE: FP8[Q_SCALE].index_fill(0, torch.tensor([3]), float("inf"))},
        FP8_CONFIG,
        [(506, f"tensor {Q_SCALE}", "positive, finite scales", "NaN or Inf at row 3, column 0")],
    ),
    "codes NaN": (
        {**FP8, Q: FP8[Q].view(torch.uint8).index_fill(0, torch.tensor([1]), 0x7F).view(torch.float8_e4m3fn)},
        FP8_CONFIG,
        [(501, f"tensor {Q}", "finite values", "NaN or Inf at row 1, column 0")],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_QUANTIZATION)
def test_damaged_quantization_is_found(tmp_path: Path, damage: str) -> None:
    tensors, config, expected = DAMAGED_QUANTIZATION[damage]
    assert found(report_of(write(tmp_path / "a", tensors, config))) == expected


@pytest.mark.parametrize(("suffix", "number"), [("weight_scale", 508), ("input_scale", 507)])
def test_unequal_scales_in_a_fused_group_are_found(tmp_path: Path, suffix: str, number: int) -> None:
    modules = [SCHEMA.tensor(Role.ATTENTION, f"{x}_proj.weight", 0).module for x in "qkv"]
    scales = {f"{module}.{suffix}": torch.full((1,), 0.5) for module in modules}
    plain = {name: value for name, value in FP8.items() if name not in {f"{m}.weight_scale" for m in modules}}
    per_tensor = {**(FP8 if suffix == "input_scale" else plain), **scales}
    assert number not in {finding[0] for finding in found(report_of(write(tmp_path / "a", per_tensor, FP8_CONFIG)))}
    per_tensor[f"{modules[1]}.{suffix}"] = torch.full((1,), 0.25)
    findings = found(report_of(write(tmp_path / "b", per_tensor, FP8_CONFIG)))
    names = ", ".join(sorted(scales))
    assert (number, names, "one value", "different values") in findings


def test_two_layouts_in_one_checkpoint(tmp_path: Path) -> None:
    stacked = packed(TENSORS)
    wrong = {name for name in stacked if ".layers.2.mlp.experts." in name}
    tensors = {name: value for name, value in TENSORS.items() if ".layers.2.mlp.experts." not in name}
    report = inspect_folder(write(tmp_path / "a", {**tensors, **{name: stacked[name] for name in wrong}}), "CKPT")
    assert report.findings[0].check.number == 201
    assert (209, "layout", "split throughout, as most tensors are") in {
        (f.check.number, f.subject, f.expected) for f in report.findings
    }
    assert set(report.unexpected) == wrong


def test_a_packed_tensor_of_the_wrong_shape(tmp_path: Path) -> None:
    stacked = packed(TENSORS)
    name = next(name for name in stacked if name.endswith(".1.mlp.experts.down_proj"))
    stacked[name] = stacked[name].transpose(1, 2).contiguous()
    report = report_of(write(tmp_path / "a", stacked))
    assert found(report) == [(206, f"tensor {name}", "[4, 48, 24], from config.json", "[4, 24, 48]")]
    assert report.missing == {}


def test_damage_in_a_packed_tensor_names_the_expert_and_the_stored_tensor(tmp_path: Path) -> None:
    report = report_of(
        write(tmp_path / "a", packed({**TENSORS, DOWN: TENSORS[DOWN].index_fill(0, torch.tensor([5]), float("nan"))}))
    )
    stored = "model.layers.1.mlp.experts.down_proj"
    place = f"NaN or Inf at row 5, column 0 (stored in {stored})"
    assert found(report) == [(501, f"tensor {DOWN}", "finite values", place)]


def test_a_hole_of_zeros_is_found(tmp_path: Path) -> None:
    config = small_config(hidden_size=1024, moe_intermediate_size=1024, num_hidden_layers=2, n_routed_experts=2)
    schema = expand(Glm4MoeConfig.from_hf(config))
    tensors = random_tensors(schema)
    name = schema.tensor(Role.EXPERT, "up_proj.weight", 1, 1).name
    tensors[name][512:] = 0
    findings = found(report_of(write(tmp_path / "a", tensors, config)))
    assert findings == [(505, f"tensor {name}", "trained values throughout", "1 MiB of zeros at row 512, column 0")]


def test_every_finding_has_its_own_number_reason_and_remedy() -> None:
    checks = [value for value in vars(catalog).values() if isinstance(value, Check)]
    assert len({check.number for check in checks}) == len(checks) == 41
    for check in checks:
        assert check.reason.endswith("."), check.number
        assert check.remedy.endswith("."), check.number
        assert isinstance(check.severity, Severity)
