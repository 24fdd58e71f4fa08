import math

import torch
from torch import nn

from runtime.model.norm import RMSNorm
from runtime.model.rope import build_rope


def filled_norm(weight: torch.Tensor, eps: float) -> RMSNorm:
    norm = RMSNorm(len(weight), eps)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def test_norm_hand_case():
    out = filled_norm(torch.tensor([1.0, 10.0]), 0.0)(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(out, torch.tensor([3.0, 40.0]) / math.sqrt(12.5))


def test_norm_eps_is_inside_the_root():
    out = filled_norm(torch.ones(2), 1.0)(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(out, torch.full((2,), 1 / math.sqrt(2)))


def test_norm_bf16_rounds_before_the_weight():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    wide = hidden.float() * torch.rsqrt(hidden.float().square().mean() + 1e-5)
    out = filled_norm(weight, 1e-5)(hidden)
    assert torch.equal(out, wide.bfloat16() * weight)
    assert not torch.equal(out, (wide * weight.float()).bfloat16())


def test_rope_turns_dim_j_with_dim_j_plus_r_and_passes_the_rest():
    """rotary_dim 4 of 6: dims (0, 2) turn by position, dims (1, 3) by position / 100^(1/2)."""
    heads = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 6.0]).view(1, 1, 1, 6)
    out = build_rope(torch.tensor([3]), 4, 100.0).rotate(heads).flatten()
    expected = [math.cos(3), -math.sin(0.3), math.sin(3), math.cos(0.3), 5.0, 6.0]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_rope_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            build_rope(torch.tensor([position]), 8, 1e4).rotate(heads)
            for heads, position in ((query, query_position), (key, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(9, 4) - score(6, 1)) < 1e-5
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rope_bf16_is_rounded_once():
    torch.manual_seed(0)
    heads, rope = torch.randn(1, 3, 2, 8).bfloat16(), build_rope(torch.arange(3), 8, 1e4)
    assert torch.equal(rope.rotate(heads), rope.rotate(heads.float()).bfloat16())
