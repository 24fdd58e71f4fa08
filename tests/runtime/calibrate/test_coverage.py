"""Experts that the router avoids: which tokens they are measured on instead."""

import pytest
import torch
import torch.nn.functional as F

from converters.quant.stats import coverage
from runtime.calibrate.coverage import Routed, extra_tokens
from tests.runtime.calibrate.conftest import job_on
from tests.runtime.calibrate.hooked import Seen
from tests.runtime.calibrate.test_against_transformers import RTOL, reference

LAYER, EXPERT = 1, 5
MODULES = [f"model.layers.{LAYER}.mlp.experts.{EXPERT}.{x}_proj" for x in ("gate", "up", "down")]


@pytest.fixture
def avoided(make_checkpoint):
    """A checkpoint whose first router never chooses one expert."""
    checkpoint = make_checkpoint()
    checkpoint.hf.model.layers[LAYER].mlp.gate.e_score_correction_bias[EXPERT] = -100.0
    checkpoint.save()
    return checkpoint


def run(checkpoint, windows, min_expert_tokens):
    with job_on(checkpoint.folder, windows, min_expert_tokens=min_expert_tokens) as job:
        return job.run()


def test_an_avoided_expert_is_measured_on_the_tokens_it_would_like_best(avoided, windows):
    moe = avoided.hf.model.layers[LAYER].mlp
    inputs: list[torch.Tensor] = []
    handle = moe.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    reference(avoided, windows)
    handle.remove()
    rows = torch.cat(inputs)
    best = rows[(rows @ moe.gate.weight[EXPERT]).topk(10).indices]
    gate, up = F.linear(best, moe.experts.gate_up_proj[EXPERT]).chunk(2, dim=-1)
    stats = run(avoided, windows, 10)
    assert [stats.tokens[name] for name in MODULES] == [0, 0, 0]
    assert {stats.filled[name] for name in MODULES} == {"0 routed tokens and 10 more by router score"}
    expected = [float(best.abs().max()), float(best.abs().max()), float((F.silu(gate) * up).abs().max())]
    assert [stats.input_amax[name] for name in MODULES] == pytest.approx(expected, rel=RTOL)


def test_extra_tokens_change_nothing_for_the_layers_above(avoided, windows):
    few, many = run(avoided, windows, 0), run(avoided, windows, 60)
    above = [name for name in few.input_amax if name.startswith("model.layers.2.self_attn")]
    assert len(above) == 4
    assert all(few.input_amax[name] == many.input_amax[name] for name in above)
    assert few.tokens == many.tokens
    # all tokens of the layer, where it has no more
    assert many.filled[MODULES[0]] == "0 routed tokens and 60 more by router score"
    assert many.input_amax[MODULES[0]] == many.input_amax[MODULES[0].replace("experts.5", "shared_experts")]


def test_without_extra_tokens_the_layers_largest_figures_are_taken(avoided, windows):
    seen, *_ = reference(avoided, windows)
    stats = run(avoided, windows, 0)
    for name in MODULES:
        others = [seen.amax(name.replace(f".{EXPERT}.", f".{other}.")) for other in range(8) if other != EXPERT]
        assert stats.input_amax[name] == pytest.approx(max(others), rel=RTOL)
        assert stats.filled[name] == "largest of the layer's experts"


def test_coverage_counts_what_the_router_did(avoided, windows):
    seen: Seen
    seen, *_ = reference(avoided, windows)
    stats = run(avoided, windows, 20)
    rows = {row.layer: row for row in coverage(stats.tokens, stats.filled)}
    assert rows.keys() == {1, 2, 3}
    for layer, row in rows.items():
        counts = sorted(seen.rows(f"model.layers.{layer}.mlp.experts.{e}.gate_proj") for e in range(8))
        assert (row.experts, row.min_tokens, row.median_tokens) == (8, counts[0], sum(counts[3:5]) / 2)
        assert row.filled == sum(count < 20 for count in counts)
    assert rows[LAYER].min_tokens == 0


def test_extra_tokens_are_the_best_of_the_others_and_of_equal_ones_the_first():
    logits = torch.tensor([[0.0], [3.0], [1.0], [3.0], [2.0], [3.0]])
    ids = torch.tensor([[1], [0], [1], [1], [1], [1]])
    routed = Routed(logits, ids, torch.ones(6, 1))
    assert extra_tokens(routed, 0, 1).tolist() == []
    assert extra_tokens(routed, 0, 2).tolist() == [3]
    assert extra_tokens(routed, 0, 4).tolist() == [3, 4, 5]
    assert extra_tokens(routed, 0, 99).tolist() == [0, 2, 3, 4, 5]
