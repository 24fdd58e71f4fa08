"""Formats told by what is stored, in all three dialects."""

import json
from pathlib import Path
from typing import Any

import pytest

from converters.inspect.logical import LogicalTensor
from converters.inspect.quantization import StoredScheme, describe, read_declaration, stored_scheme

N, K = 1536, 5120
CT, MODELOPT, DEEPSEEK = "compressed-tensors", "modelopt", "deepseek"


def parts(**stored: tuple[str, tuple[int, ...]]) -> dict[str, LogicalTensor]:
    """Return stored parts by suffix; `weight` stands for the weight's own name."""
    return {
        "" if suffix == "weight" else suffix: LogicalTensor(suffix, dtype, shape, (), None)
        for suffix, (dtype, shape) in stored.items()
    }


CODES = ("F8_E4M3", (N, K))
LOCAL = ("F8_E4M3", (N, K // 16))
NIBBLES = ("U8", (N, K // 2))
ONE = ("F32", (1,))


@pytest.mark.parametrize(
    ("stored", "scheme", "dialect", "storage", "group_size"),
    [
        (
            {"weight": CODES, "weight_scale": ("BF16", (N, 1))},
            "fp8",
            CT,
            "F8_E4M3 [N, K], scale BF16 [N, 1]",
            1,
        ),
        ({"weight": CODES, "weight_scale": ("F32", (N,))}, "fp8", CT, "F8_E4M3 [N, K], scale F32 [N]", 1),
        ({"weight": CODES, "weight_scale": ("BF16", (1,))}, "fp8-tensor", CT, "F8_E4M3 [N, K], scale BF16 [1]", 1),
        (
            {"weight": CODES, "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
            "fp8-static",
            MODELOPT,
            "F8_E4M3 [N, K], scale F32 []",
            1,
        ),
        (
            {"weight": CODES, "weight_scale": ("BF16", (12, 40))},
            "fp8-block",
            CT,
            "F8_E4M3 [N, K], scale BF16 [N/128, K/128]",
            128,
        ),
        (
            {"weight": CODES, "weight_scale_inv": ("F32", (12, 40))},
            "fp8-block",
            DEEPSEEK,
            "F8_E4M3 [N, K], scale F32 [N/128, K/128]",
            128,
        ),
        (
            {"weight": CODES, "weight_scale": ("U8", (N, K // 32))},
            "mxfp8",
            CT,
            "F8_E4M3 [N, K], scale U8 [N, K/32]",
            32,
        ),
        ({"weight": ("I8", (N, K)), "weight_scale": ("BF16", (N, 1))}, "int8", CT, "I8 [N, K], scale BF16 [N, 1]", 1),
        (
            {"weight_packed": ("I32", (N, K // 4)), "weight_scale": ("BF16", (N, 1)), "weight_shape": ("I64", (2,))},
            "int8-weight-only",
            CT,
            "I32 [N, K/4], scale BF16 [N, 1]",
            1,
        ),
        (
            {"weight_packed": ("I32", (N, K // 8)), "weight_scale": ("BF16", (N, K // 64))},
            "int4-weight-only",
            CT,
            "I32 [N, K/8], scale BF16 [N, K/64]",
            64,
        ),
        (
            {"weight_packed": NIBBLES, "weight_scale": LOCAL, "weight_global_scale": ONE},
            "nvfp4-weight-only",
            CT,
            "U8 [N, K/2], scale F8_E4M3 [N, K/16]",
            16,
        ),
        (
            {"weight_packed": NIBBLES, "weight_scale": LOCAL, "weight_global_scale": ONE, "input_global_scale": ONE},
            "nvfp4",
            CT,
            "U8 [N, K/2], scale F8_E4M3 [N, K/16]",
            16,
        ),
        (
            {"weight": NIBBLES, "weight_scale": LOCAL, "weight_scale_2": ("F32", ()), "input_scale": ("F32", ())},
            "nvfp4",
            MODELOPT,
            "U8 [N, K/2], scale F8_E4M3 [N, K/16]",
            16,
        ),
        (
            {"weight_packed": NIBBLES, "weight_scale": ("U8", (N, K // 32))},
            "mxfp4",
            CT,
            "U8 [N, K/2], scale U8 [N, K/32]",
            32,
        ),
        ({"weight": CODES}, "fp8", CT, "F8_E4M3 [N, K], no scale", 1),
    ],
)
def test_scheme_is_told_by_what_is_stored(
    stored: dict[str, Any], scheme: str, dialect: str, storage: str, group_size: int
) -> None:
    expected = StoredScheme(scheme, dialect, storage, group_size, "no scale" not in storage)
    assert stored_scheme(parts(**stored), (N, K)) == expected


def test_ragged_blocks_have_the_side_of_a_whole_one() -> None:
    found = stored_scheme(parts(weight=("F8_E4M3", (10944, 4096)), weight_scale=("BF16", (86, 32))), (10944, 4096))
    assert found is not None
    assert (found.scheme, found.group_size, found.storage) == (
        "fp8-block",
        128,
        "F8_E4M3 [N, K], scale BF16 [N/128, K/128]",
    )


def test_plain_weights_and_vectors_have_no_scheme() -> None:
    assert stored_scheme(parts(weight=("BF16", (N, K))), (N, K)) is None
    assert stored_scheme(parts(weight=("F32", (N,))), (N,)) is None


def test_declaration_of_modelopt_in_its_own_file_is_the_evidence(tmp_path: Path) -> None:
    block = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": block}))
    declared = read_declaration({}, tmp_path)
    assert declared.problem is None
    assert [scheme.name for scheme in declared.schemes] == ["nvfp4"]
    found = describe({}, {}, declared, {})
    assert (found.ignore, found.kv_cache) == (("lm_head",), "fp8")
    assert found.evidence == (
        "hf_quant_config.json quant_method modelopt",
        "hf_quant_config.json quant_algo NVFP4",
    )


def test_declaration_that_cannot_be_read_is_a_problem_not_an_error(tmp_path: Path) -> None:
    for block in ("fp8", {"quant_method": "compressed-tensors"}, {"quant_method": "awq"}):
        declared = read_declaration({"quantization_config": block}, tmp_path)
        assert declared.problem is not None
        assert declared.block is not None
        assert declared.schemes == ()
