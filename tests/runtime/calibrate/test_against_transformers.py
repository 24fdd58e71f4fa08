"""Every statistic against forward hooks on transformers' modules, the MTP layer included."""

import math

import pytest
import torch

from converters.quant.policy import is_quantized
from converters.quant.stats import PERCENTILES
from tests.runtime.calibrate.conftest import job_on
from tests.runtime.calibrate.hooked import Seen, hooked

# two fp32 implementations that add in another order, over at most four layers; 2e-6 is measured
RTOL = 5e-5
VARIANTS = {
    "4.6": {},
    "air": {"use_qk_norm": False, "routed_scaling_factor": 1.0},
    "two_shared_experts": {"n_shared_experts": 2},
    "groups_1_of_2": {"n_group": 2, "topk_group": 1},
    "all_moe": {"first_k_dense_replace": 0},
    "all_dense": {"first_k_dense_replace": 3, "attention_bias": False},
}


def reference(checkpoint, windows) -> tuple[Seen, dict[int, float], dict[int, float]]:
    """Return what transformers' modules saw, and its largest cached keys and values by layer."""
    seen, keys, values = Seen(), {}, {}
    mtp = checkpoint.hf.config.num_hidden_layers
    layer = f"model.layers.{mtp}."
    model = checkpoint.hf.model
    with (
        hooked(checkpoint.hf, seen, {"model.layers": "model.layers"}),
        hooked(checkpoint.hf_mtp, seen, {"layer.": layer, "eh_proj": layer + "eh_proj"}),
    ):
        for window in windows:
            ids = torch.tensor([window])
            out = model(ids, use_cache=True)
            for index, cached in enumerate(out.past_key_values.layers):
                keys[index] = max(keys.get(index, 0.0), float(cached.keys.abs().max()))
                values[index] = max(values.get(index, 0.0), float(cached.values.abs().max()))
            embedding = model.embed_tokens(ids[:, 1:])
            rope = model.rotary_emb(embedding, torch.arange(len(window) - 1)[None])
            checkpoint.hf_mtp(embedding, out.last_hidden_state[:, :-1], rope)
    return seen, keys, values


@pytest.mark.parametrize("variant", VARIANTS)
def test_amax_and_tokens_of_every_module(make_checkpoint, windows, variant):
    checkpoint = make_checkpoint(seed=len(variant), **VARIANTS[variant])
    seen, keys, values = reference(checkpoint, windows)
    with job_on(checkpoint.folder, windows) as job:
        stats = job.run()
        expected = {tensor.module for tensor in job.source.schema.tensors.values() if is_quantized(tensor)}
    assert stats.input_amax.keys() == stats.tokens.keys() == stats.percentiles.keys() == expected
    assert expected == seen.inputs.keys() - {f"model.layers.{len(keys)}.eh_proj"}
    assert stats.tokens == {name: seen.rows(name) for name in expected}
    heard = {name for name in expected if seen.rows(name)}
    assert {name: stats.input_amax[name] for name in heard} == {
        name: pytest.approx(seen.amax(name), rel=RTOL) for name in heard
    }
    assert stats.filled.keys() == expected - heard
    # transformers' cache has no MTP layer
    mtp = len(keys)
    assert stats.key_amax.keys() == stats.value_amax.keys() == {*keys, mtp}
    for layer, amax in keys.items():
        assert stats.key_amax[layer] == pytest.approx(amax, rel=RTOL)
        assert stats.value_amax[layer] == pytest.approx(values[layer], rel=RTOL)


def test_percentile_bounds_hold_and_are_near(make_checkpoint, windows):
    checkpoint = make_checkpoint()
    seen, *_ = reference(checkpoint, windows)
    with job_on(checkpoint.folder, windows) as job:
        stats = job.run()
    for name, bounds in stats.percentiles.items():
        if name in stats.filled:
            continue
        magnitudes = seen.magnitudes(name).sort().values
        for key, bound in bounds.items():
            exact = float(magnitudes[math.ceil(len(magnitudes) * PERCENTILES[key]) - 1])
            assert exact * (1 - RTOL) <= bound <= exact * (1 + RTOL) * 17 / 16, (name, key)


def test_fellows_of_a_fused_weight_share_their_figures(make_checkpoint, windows):
    with job_on(make_checkpoint().folder, windows) as job:
        stats = job.run()
        tensors = [tensor for tensor in job.source.schema.tensors.values() if is_quantized(tensor)]
    groups: dict[tuple, set[float]] = {}
    for tensor in tensors:
        if tensor.spec.fuse:
            key = (tensor.name.rsplit(".", 2)[0], tensor.spec.fuse.group)
            groups.setdefault(key, set()).add(stats.input_amax[tensor.module])
    assert len(groups) > 20
    assert {len(values) for values in groups.values()} == {1}


def test_a_scaled_norm_scales_what_its_modules_see(make_checkpoint, windows):
    """Proves that the comparison above would see a statistic of the wrong layer."""
    checkpoint = make_checkpoint()
    with job_on(checkpoint.folder, windows) as job:
        before = job.run()

    def change(tensors):
        tensors["model.layers.2.input_layernorm.weight"] *= 2

    checkpoint.edit(change)
    with job_on(checkpoint.folder, windows) as job:
        after = job.run()
    q_proj = "model.layers.2.self_attn.q_proj"
    assert after.input_amax[q_proj] == 2 * before.input_amax[q_proj]
    assert all(after.input_amax[name] == value for name, value in before.input_amax.items() if ".layers.1." in name)
