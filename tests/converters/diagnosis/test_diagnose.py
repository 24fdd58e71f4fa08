"""What a diagnosis says is proved: where no hypothesis holds it says nothing, and two faults are told apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_tensors, small_config, write_checkpoint
from quantized import SIZES
from quantized_from import MAKERS, SCHEMA, write_pair

from converters.compare import compare_structure
from converters.config import Glm4MoeConfig
from converters.diagnosis.cause import Cause, CauseCode
from converters.diagnosis.diagnose import diagnose_folders
from converters.quant.certify import CertifyOptions, certify_folders
from converters.schema import Role, expand

Tensors = dict[str, torch.Tensor]
CONFIG = small_config(**SIZES, num_hidden_layers=3)
PLAIN = expand(Glm4MoeConfig.from_hf(CONFIG))
UP, DOWN = (PLAIN.tensor(Role.EXPERT, part, 1, 2).name for part in ("up_proj.weight", "down_proj.weight"))
Q = PLAIN.tensor(Role.ATTENTION, "q_proj.weight", 1).name
HEAD = PLAIN.tensor(Role.HEAD, "lm_head.weight").name


def causes(source: Path, candidate: Path) -> tuple[Cause, ...]:
    structure = compare_structure(source, candidate)
    weights = certify_folders(source, candidate, CertifyOptions(1), lambda _: lambda _: None)
    assert weights.findings
    return diagnose_folders(source, candidate, structure, weights)


def plain_pair(folder: Path, damage: Callable[[Tensors], object], **config: Any) -> tuple[Path, Path]:
    tensors = random_tensors(PLAIN)
    source = write_checkpoint(folder / "source", tensors, CONFIG)
    damage(tensors)
    return source, write_checkpoint(folder / "copy", tensors, {**CONFIG, **config})


def noise(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(5)
    value = tensors[UP]
    tensors[UP] = (value.float() * (1 + 0.05 * torch.randn(value.shape, generator=generator))).to(value.dtype)


def other_values(tensors: Tensors) -> None:
    tensors[UP] = torch.randn(tensors[UP].shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)


def nearly_exchanged(tensors: Tensors) -> None:
    """Another expert's weight, but for one row: the first, middle and last rows alone would prove it."""
    other = tensors[UP.replace("experts.2", "experts.0")].clone()
    other[20] += 1
    tensors[UP] = other


def nearly_gained(tensors: Tensors) -> None:
    value = tensors[UP].float() * 1.5
    value[3, 3] *= 1.1
    tensors[UP] = value.to(torch.bfloat16)


@pytest.mark.parametrize("damage", [noise, other_values, nearly_exchanged, nearly_gained])
def test_nothing_is_said_where_nothing_is_proved(tmp_path: Path, damage: Callable[[Tensors], object]) -> None:
    assert causes(*plain_pair(tmp_path, damage)) == ()


@pytest.mark.parametrize("dialect", ["ct-fp8-channel", "ct-nvfp4", "ct-int8-channel", "ct-fp8-block"])
def test_random_codes_are_not_explained(tmp_path: Path, dialect: str) -> None:
    name = SCHEMA.tensor(Role.EXPERT, "up_proj.weight", 1, 2).module

    def damage(stored: Tensors) -> None:
        key = next(key for key in (f"{name}.weight_packed", f"{name}.weight") if key in stored)
        codes = stored[key].view(torch.uint8)
        order = torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(3))
        stored[key] = codes.flatten()[order].view(codes.shape).view(stored[key].dtype)

    assert causes(*write_pair(tmp_path, MAKERS[dialect], damage)) == ()


def test_two_faults_are_two_causes(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[DOWN] = torch.zeros_like(tensors[DOWN])
        tensors[HEAD] = tensors[HEAD].roll(-2, dims=0)

    found = causes(*plain_pair(tmp_path, damage))
    assert {(cause.code, cause.tensors) for cause in found} == {
        (CauseCode.ZERO, (DOWN,)),
        (CauseCode.ROWS_SHIFTED, (HEAD,)),
    }


def test_a_fault_of_the_config_does_not_hide_one_of_the_weights(tmp_path: Path) -> None:
    """Structure fails, so that weights are not compared; where layers are suspected, their weights are looked at."""
    source, copy = plain_pair(tmp_path, lambda tensors: tensors.update({DOWN: -tensors[DOWN]}), rope_theta=7)
    structure = compare_structure(source, copy)
    assert [cause.code for cause in diagnose_folders(source, copy, structure)] == [CauseCode.CONFIG]
    found = diagnose_folders(source, copy, structure, layers=[1])
    assert [(cause.code, cause.tensors) for cause in found] == [(CauseCode.CONFIG, ()), (CauseCode.NEGATED, (DOWN,))]


def test_suspected_layers_are_judged_without_a_certificate(tmp_path: Path) -> None:
    source, copy = plain_pair(tmp_path, lambda tensors: tensors.update({Q: tensors[Q] * 2}))
    assert diagnose_folders(source, copy, layers=[0, 2]) == ()
    (cause,) = diagnose_folders(source, copy, layers=[1])
    assert (cause.code, cause.tensors) == (CauseCode.GAIN, (Q,))
    assert "one factor 2 " in cause.evidence


@pytest.mark.parametrize("order", [(1, 2, 0, 3), (3, 2, 1, 0)])
def test_permuted_experts(tmp_path: Path, order: tuple[int, ...]) -> None:
    def damage(tensors: Tensors) -> None:
        before = dict(tensors)
        for expert, origin in enumerate(order):
            for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
                name = PLAIN.tensor(Role.EXPERT, part, 2, expert).name
                tensors[name] = before[PLAIN.tensor(Role.EXPERT, part, 2, origin).name]

    (cause,) = causes(*plain_pair(tmp_path, damage))
    assert cause.code is CauseCode.PERMUTED
    moved = [f"{expert} holds {origin}" for expert, origin in enumerate(order) if expert != origin]
    assert cause.statement == f"experts of layer 2 are permuted: {', '.join(moved)}"


def test_only_one_part_exchanged(tmp_path: Path) -> None:
    other = PLAIN.tensor(Role.EXPERT, "down_proj.weight", 1, 0).name

    def damage(tensors: Tensors) -> None:
        tensors[DOWN], tensors[other] = tensors[other], tensors[DOWN]

    (cause,) = causes(*plain_pair(tmp_path, damage))
    assert cause.statement == "down_proj of experts 0 and 2 of layer 1 are exchanged"
    assert set(cause.tensors) == {DOWN, other}


def test_the_gain_is_told_to_its_digits(tmp_path: Path) -> None:
    (cause,) = causes(
        *plain_pair(tmp_path, lambda tensors: tensors.update({DOWN: tensors[DOWN].float().mul(0.98).bfloat16()}))
    )
    assert cause.code is CauseCode.GAIN
    assert cause.statement.startswith("it is multiplied by 0.98")


def test_values_beyond_e4m3_went_through_it_saturated(tmp_path: Path) -> None:
    """The cast alone made NaN of them with torch before 2.13, and NaN explains nothing."""

    def grow(tensors: Tensors) -> None:
        # half of them beyond 448
        tensors[UP] = (tensors[UP].float() * 664 / tensors[UP].float().abs().median()).bfloat16()

    def cast(tensors: Tensors) -> None:
        grow(tensors)
        tensors[UP] = tensors[UP].float().clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16()

    _, source = plain_pair(tmp_path / "grown", grow)
    _, copy = plain_pair(tmp_path / "cast", cast)
    (cause,) = causes(source, copy)
    assert (cause.code, cause.tensors) == (CauseCode.ROUNDED_FURTHER, (UP,))
    assert cause.statement.startswith("its values went through float8_e4m3fn")


def test_nothing_to_say_of_equal_folders(tmp_path: Path) -> None:
    source, copy = plain_pair(tmp_path, lambda _: None)
    assert diagnose_folders(source, copy, compare_structure(source, copy), None, [0, 1, 2, 3]) == ()
