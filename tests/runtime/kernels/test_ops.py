"""Norm, rotary embedding, paged attention and sampling in triton's interpreter, and what their twins stand for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime.engine.request import SamplingParams
from runtime.kernels.launch import Launch
from runtime.kernels.ops.paged_attention import invariant_paged_attention, paged_attention, tile
from runtime.kernels.twins.rms_norm import rms_norm
from runtime.kernels.twins.sampling import philox_uniforms, sample
from runtime.model.norm import RMSNorm
from tests.runtime.kernels.ops import AttentionCase, cases, normal
from tests.runtime.nucleus import nucleus


@pytest.fixture(scope="module")
def found(child: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the cases found."""
    return child("ops", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


@pytest.mark.parametrize("name", list(cases()))
def test_kernel_agrees_with_its_twin(found: dict[str, Any], name: str) -> None:
    assert found[name] == []


def test_every_case_ran(found: dict[str, Any], tally: Callable[[str], None]) -> None:
    assert set(found) == set(cases())
    kinds = [name.split()[0] for name in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    tally(f"other kernels against their twins: {counts} cases")


def test_norm_is_the_model_s() -> None:
    norm = RMSNorm(40, 1e-5)
    norm.weight = torch.nn.Parameter(normal(1, 40).bfloat16(), requires_grad=False)
    hidden = normal(2, 3, 40).bfloat16()
    assert torch.equal(rms_norm(hidden, norm.weight, 1e-5), norm(hidden))


@pytest.mark.parametrize(
    ("heads_per_group", "max_tokens_q", "expected"),
    [(12, 1, (1, 16)), (12, 2, (2, 32)), (12, 5, (5, 64)), (12, 6, (10, 128)), (12, 4096, (10, 128)), (1, 1, (16, 16))],
)
def test_query_heads_of_a_group_fill_the_rows(
    heads_per_group: int, max_tokens_q: int, expected: tuple[int, int]
) -> None:
    found = tile(max_tokens_q, heads_per_group)
    assert (found.tokens, found.rows) == expected


def test_an_invariant_tile_is_the_same_for_every_batch() -> None:
    assert len({tile(tokens, 12, is_invariant=True) for tokens in (1, 2, 17, 4096)}) == 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_invariant_attention_is_launched_alike_for_every_batch(monkeypatch: pytest.MonkeyPatch, stored) -> None:
    """One program, compiled once: as many tokens and keys of a tile, and no runs; the free one has others."""
    launched = list[Launch]()

    def note(launch: Launch) -> tuple[torch.Tensor, ...]:
        launched.append(launch)
        return launch.outputs

    monkeypatch.setattr(Launch, "run", note)
    found = {}
    for attend in (invariant_paged_attention, paged_attention):
        launched.clear()
        for new, lengths in (((1,), (70,)), ((17,), (70,)), ((1, 300), (9, 300)), ((1, 1), (640, 5))):
            query, pages, batch = AttentionCase(torch.bfloat16, stored, new, lengths).inputs()
            attend(query, pages, batch, run_tokens=512 if max(new) == 1 else 0)
        # how many sequences there are says only how they are found
        found[attend] = [
            ({name: value for name, value in one.constants.items() if name != "SEQUENCES_PAD"}, one.num_warps)
            for one in launched
        ]
    one, *others = found[invariant_paged_attention]
    assert len(others) == 3
    assert all(other == one for other in others)
    assert any(other != found[paged_attention][0] for other in found[paged_attention])


@pytest.mark.parametrize("logits_kind", ["normal", "ties"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (2.0, 20, 0.5), (0.5, 1, 0.9), (1.0, 7, 0.01)],
)
def test_tokens_come_up_as_often_as_the_nucleus_says(
    logits_kind: str, temperature: float, top_k: int, top_p: float
) -> None:
    """Places at even distances meet each token as often as its share says, give or take one."""
    logits_V = normal(1, 60) * 2
    # quotients of ties are equal in fp32 and in fp64
    logits_V = logits_V.round() if logits_kind == "ties" else logits_V
    probabilities, ids = nucleus(logits_V, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    count = 4000
    rows = (
        logits_V.expand(count, -1), torch.full((count,), temperature), torch.full((count,), top_k),
        torch.full((count,), top_p), (torch.arange(count, dtype=torch.float64) + 0.5) / count,
    )  # fmt: skip
    expected_V = torch.zeros(60, dtype=torch.float64)
    expected_V[ids] = probabilities / probabilities.sum() * count
    times_V = torch.bincount(sample(*rows), minlength=60)
    assert times_V[expected_V == 0].sum() == 0
    # both ends of a token's run of places may be off by one, and masses by fp32's last bits
    assert float((times_V - expected_V).abs().max()) < 1.01


def test_without_temperature_the_lowest_of_the_most_likely_tokens_is_chosen() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0], [-0.0, 0.0, -1.0], [1.0, float("nan"), 3.0]])
    off = torch.zeros(3)
    assert sample(logits_BV, off, off.int(), off + 1, off.double()).tolist() == [1, 0, -1]


def test_choosing_the_most_likely_token_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = normal(1, 3, 5000).round()
    logits_BV[:, [4200, 17, 4999]] = 9.0
    off, expected = torch.zeros(3), logits_BV.sort(descending=True, stable=True).indices[:, 0]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    assert sample(logits_BV, off, off.int(), off + 1, off.double()).tolist() == expected.tolist() == [17] * 3
    with pytest.raises(AssertionError, match="sorted"):
        sample(logits_BV, off + 1, off.int(), off + 1, off.double())


def test_a_row_without_temperature_is_chosen_beside_rows_with_one() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0]])
    temperature, off = torch.tensor([0.0, 1.0]), torch.zeros(2)
    assert sample(logits_BV, temperature, off.int(), off + 1, torch.full((2,), 0.99).double()).tolist() == [1, 2]


def test_random_numbers_are_philox() -> None:
    """Words of Random123's known answers: 4x32 in 10 rounds, counter and key 0."""
    (found,) = philox_uniforms(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).tolist()
    assert found == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) * 2.0**-53
