"""Experts in grouped layout, loaded from every layout and scheme: the model that the loop over experts is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import write_index
from quantizing import checkpoint, quantize
from safetensors.torch import load_file, save_file

from converters.convert import ConvertOptions, plan_convert
from converters.errors import InputError, UsageError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.loader import LoadedModel, load_model
from runtime.moe.fused_ops import FusedOps
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme

# two fp32 implementations that add in another order; the bound that the comparison with transformers has
ATOL = 1e-4
GROUPED = ("batched", "cutlass", "triton")
# scheme and format on disk -> scheme that codes are kept in
KEPT = {
    ("fp8", "compressed-tensors"): ExpertScheme.FP8_CHANNEL,
    ("fp8", "modelopt"): ExpertScheme.FP8_CHANNEL,
    ("fp8-static", "compressed-tensors"): ExpertScheme.FP8_CHANNEL,
    ("fp8-block", "deepseek"): ExpertScheme.FP8_BLOCK,
    ("fp8-block", "compressed-tensors"): ExpertScheme.FP8_BLOCK,
    ("int8", "compressed-tensors"): ExpertScheme.INT8_CHANNEL,
    ("int8-weight-only", "compressed-tensors"): ExpertScheme.FP32,  # packed into words: decoded
    ("nvfp4-weight-only", "compressed-tensors"): ExpertScheme.NVFP4,
    ("nvfp4-weight-only", "modelopt"): ExpertScheme.NVFP4,
}


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the triton backend does around its kernels, with their twins."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("backends") / "src", n_routed_experts=3)


def load(folder: Path, backend: str = "vanilla", **engine: object) -> LoadedModel:
    return load_model(folder, EngineConfig(dtype="float32", moe_backend=backend, **engine))


def blocks(loaded: LoadedModel) -> list[MoE]:
    """Return the MoE blocks, the MTP layer's last."""
    return [layer.mlp for layer in loaded.model.model.layers if isinstance(layer.mlp, MoE)]


def weights_of(moe: MoE, num_experts: int) -> list[torch.Tensor]:
    """Return gate, up and down of each expert, then of the shared one, multiplied out to fp32."""
    if moe.local is None:
        mlps = [*moe.experts, moe.shared_experts][:num_experts]
        return [one.dequantized(torch.float32) for mlp in mlps for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    up, down = moe.local.weights.up_values(torch.float32), moe.local.weights.down_values(torch.float32)
    return [one for e in range(num_experts) for one in (up[e, 0::2], up[e, 1::2], down[e])]


@torch.inference_mode()
def outputs(loaded: LoadedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the main model and of the MTP layer's drafts."""
    assert loaded.mtp is not None
    hidden = loaded.model(ids)
    drafted = loaded.mtp.draft(loaded.model.embed(ids[:, 1:]), hidden[:, :-1])
    return loaded.model.logits(hidden), loaded.model.logits(drafted)


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("backend", GROUPED)
def test_fixture_logits_and_drafts_are_the_same_in_every_backend(tiny, backend, fused):
    ids = torch.randint(0, 900, (2, 40), generator=torch.Generator().manual_seed(3))
    loaded = load(tiny, backend, fused_shared_experts=fused)
    for ours, expected in zip(outputs(loaded, ids), outputs(load(tiny), ids), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)
    assert {moe.local.weights.num_shared for moe in blocks(loaded)} == {int(fused == "on")}
    assert len(blocks(loaded)) == 5


def test_fixture_logits_do_not_depend_on_the_batch_where_that_is_asked_for(tiny):
    """Attention is torch's own: the block alone is compared, on what it sees in the model."""
    loaded = load(tiny, "batched", moe_deterministic=True)
    hidden = torch.randn(1, 33, 128)
    for moe in blocks(loaded):
        whole = moe(hidden, None).clone()
        assert torch.equal(whole[:, 7:8], moe(hidden[:, 7:8], None))


def test_fixture_in_bf16_stays_as_near_to_fp32_as_the_loop_does(tiny):
    ids = torch.randint(0, 900, (2, 40), generator=torch.Generator().manual_seed(3))
    exact, _ = outputs(load(tiny), ids)
    errors = {}
    for backend in ("vanilla", *GROUPED):
        loaded = load_model(tiny, EngineConfig(dtype="bfloat16", moe_backend=backend))
        errors[backend] = float((outputs(loaded, ids)[0] - exact).abs().median())
    assert max(errors.values()) < 1.5 * errors["vanilla"], errors


@pytest.mark.parametrize(("scheme", "format_"), KEPT)
def test_codes_are_kept_from_every_layout(src, tmp_path, scheme, format_):
    quantize(src, tmp_path / "dst", scheme, format=format_)
    kept, scheme_on_disk = KEPT[scheme, format_], (scheme, format_)
    num_experts = 3 if kept is ExpertScheme.FP32 else 4
    expected = [weights_of(moe, num_experts) for moe in blocks(load(tmp_path / "dst"))]
    # blocks of scales do not fit where q, k and v become one
    for layout in set(Layout) - ({Layout.FUSED} if kept is ExpertScheme.FP8_BLOCK else set()):
        folder = tmp_path / layout
        with open_source(tmp_path / "dst") as source:
            run(plan_convert(source, ConvertOptions(layout=layout)), folder, RunOptions(1), lambda _: None)
        loaded = load(folder, "batched")
        main, mtp = (moe.local.weights.scheme for moe in blocks(loaded))
        # some formats leave the MTP layer as it is
        with open_source(folder) as source:
            formats = [one.format for one in source.weights.values() if one.stored.layer == source.schema.mtp_layer]
            is_quantized = not all(found.is_plain for found in formats)
        assert (main, mtp) == (kept, kept if is_quantized else ExpertScheme.FP32)
        for moe, values in zip(blocks(loaded), expected, strict=True):
            for ours, theirs in zip(weights_of(moe, num_experts), values, strict=True):
                if scheme_on_disk == ("nvfp4-weight-only", "compressed-tensors"):
                    # stored as a divisor: the reciprocal, and its product instead of the quotient, are rounded
                    assert ((ours - theirs).abs() <= 4 * 2.0**-24 * theirs.abs()).all()
                else:
                    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_plain_experts_are_packed_alike_from_every_layout(src, tmp_path, fused):
    """The MTP layer's are the last; a shared expert that is not fused is compared as a module."""
    folders = {Layout.SPLIT: src}
    for layout in set(Layout) - {Layout.SPLIT}:
        folders[layout] = tmp_path / layout
        with open_source(src) as source:
            run(plan_convert(source, ConvertOptions(layout=layout)), folders[layout], RunOptions(1), lambda _: None)
    found = {layout: blocks(load(folder, "batched", fused_shared_experts=fused)) for layout, folder in folders.items()}
    assert len(found) == 4
    for moes in found.values():
        for moe, expected in zip(moes, found[Layout.SPLIT], strict=True):
            weights, theirs = moe.local.weights, expected.local.weights
            assert replace(weights, up=theirs.up, down=theirs.down) == theirs
            assert weights.num_shared == int(fused == "on")
            assert torch.equal(weights.up.codes, theirs.up.codes)
            assert torch.equal(weights.down.codes, theirs.down.codes)
            if fused == "off":
                for ours, shared in zip(
                    moe.shared_experts.parameters(), expected.shared_experts.parameters(), strict=True
                ):
                    assert torch.equal(ours, shared)


@pytest.mark.parametrize("backend", GROUPED)
@pytest.mark.parametrize(("scheme", "format_"), [("fp8", "modelopt"), ("nvfp4-weight-only", "compressed-tensors")])
def test_quantized_model_is_the_same_in_every_backend(src, tmp_path, backend, scheme, format_):
    quantize(src, tmp_path / "dst", scheme, format=format_)
    ids = torch.arange(48).view(2, 24)
    for ours, expected in zip(
        outputs(load(tmp_path / "dst", backend), ids), outputs(load(tmp_path / "dst"), ids), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


def test_cutlass_multiplies_codes_out_and_says_so(src, tmp_path):
    quantize(src, tmp_path / "dst", "fp8")
    loaded = load(tmp_path / "dst", "cutlass")
    assert {moe.local.weights.scheme for moe in blocks(loaded)} == {ExpertScheme.FP32}
    assert loaded.notes == ("Experts of 2 layers are multiplied out to float32 for the backend cutlass.",)


@pytest.mark.parametrize("backend", GROUPED)
@pytest.mark.parametrize("scheme", ["fp8", "int8", "fp8-block"])
def test_inputs_are_rounded_as_served_in_every_backend(src, tmp_path, backend, scheme):
    """Codes are equal but where sums that differ in their last bits fall on two sides of a rounding."""
    quantize(src, tmp_path / "dst", scheme)
    ids = torch.arange(48).view(2, 24)
    full, _ = outputs(load(tmp_path / "dst"), ids)
    expected, _ = outputs(load(tmp_path / "dst", activations="as-served"), ids)
    ours, _ = outputs(load(tmp_path / "dst", backend, activations="as-served"), ids)
    assert (ours - expected).abs().median() < 0.05 * (full - expected).abs().median()


def test_what_is_multiplied_as_codes_is_planned_so(src, tmp_path):
    for scheme, backend, held, multiplies in (
        ("fp8", "cutlass", ExpertScheme.FP8_CHANNEL, True),
        ("fp8", "triton", ExpertScheme.FP8_CHANNEL, True),
        ("fp8", "batched", ExpertScheme.FP8_CHANNEL, False),
        ("int8", "triton", ExpertScheme.INT8_W8A8, True),
        ("int8", "batched", ExpertScheme.INT8_CHANNEL, False),
        ("fp8-block", "triton", ExpertScheme.FP8_BLOCK, True),
    ):
        folder = tmp_path / scheme
        if not folder.exists():
            quantize(src, folder, scheme)
        for moe in blocks(load(folder, backend, activations="as-served")):
            assert (moe.local.weights.scheme, moe.local.multiplies_codes) == (held, multiplies), (scheme, backend)


@pytest.mark.parametrize("format_", ["compressed-tensors", "modelopt"])
def test_calibrated_nvfp4_inputs_are_multiplied_as_codes_by_the_kernels(src, tmp_path, format_):
    """Each expert by its own scale, the shared one too; formats leave the MTP layer as it is."""
    quantize(src, tmp_path / "dst", "nvfp4", format=format_)
    ids = torch.arange(48).view(2, 24)
    loaded = load(tmp_path / "dst", "triton", activations="as-served")
    (calibrated, *_) = [moe.local.calibrated for moe in blocks(loaded)]
    assert [len(inputs.factors_E.unique()) for inputs in calibrated] == [4, 4]
    full, _ = outputs(load(tmp_path / "dst"), ids)
    expected, _ = outputs(load(tmp_path / "dst", activations="as-served"), ids)
    ours, _ = outputs(loaded, ids)
    assert (ours - expected).abs().median() < 0.05 * (full - expected).abs().median()


def test_calibrated_scales_of_gate_and_up_that_differ_are_refused(src, tmp_path):
    quantize(src, tmp_path / "dst", "nvfp4", format="modelopt")
    for file in (tmp_path / "dst").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("experts.1.up_proj.input_scale"):
                tensors[name] = tensors[name] * 2
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"^expert 1 of layer 1: expected one calibrated scale for the inputs of gate"):
        load(tmp_path / "dst", "triton", activations="as-served")


def test_calibrated_scales_of_inputs_are_refused_by_name(src, tmp_path):
    quantize(src, tmp_path / "dst", "fp8-static")
    with pytest.raises(UsageError) as error:
        load(tmp_path / "dst", "batched", activations="as-served")
    assert str(error.value) == (
        "moe_backend 'batched': expected inputs of all experts of layer 1 rounded alike, without calibrated scales, "
        "found fp8 by a calibrated scale. Use --moe-backend vanilla, or take activations as they are."
    )
    auto = load(tmp_path / "dst", "auto", activations="as-served")
    assert auto.notes == (
        "Experts run in the backend vanilla: inputs are rounded by scales that each expert has its own of.",
    )


@pytest.fixture
def mixed(src: Path, tmp_path: Path) -> Path:
    """Routed experts in FP8, the shared one as it was."""
    quantize(src, tmp_path / "mixed", "fp8", ignore=(".*shared_experts.*",))
    return tmp_path / "mixed"


def test_shared_expert_in_another_scheme_is_computed_apart_or_refused(mixed):
    loaded = load(mixed, "batched")
    assert loaded.notes == ("The shared expert of 2 layers is computed apart: its scheme or number differs.",)
    assert {moe.local.weights.num_shared for moe in blocks(loaded)} == {0}
    ids = torch.arange(20).view(1, 20)
    torch.testing.assert_close(outputs(loaded, ids)[0], outputs(load(mixed), ids)[0], rtol=0, atol=ATOL)
    with pytest.raises(UsageError) as error:
        load(mixed, "batched", fused_shared_experts="on")
    assert str(error.value) == (
        "fused_shared_experts: expected one shared expert in the scheme of the routed ones in layer 1, found routed "
        "experts in fp8-channel, the shared one in fp32. Use fused_shared_experts 'off'."
    )
    with pytest.raises(UsageError, match="^moe_deterministic: expected one shared expert in the scheme"):
        load(mixed, "batched", moe_deterministic=True)


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED])
@pytest.mark.parametrize("backend", ["cutlass", "triton"])
def test_shared_expert_in_another_scheme_is_refused_in_every_backend_and_layout(mixed, tmp_path, backend, layout):
    with open_source(mixed) as source:
        run(plan_convert(source, ConvertOptions(layout=layout)), tmp_path / "dst", RunOptions(1), lambda _: None)
    with pytest.raises(UsageError, match="^fused_shared_experts: expected one shared expert in the scheme"):
        load(tmp_path / "dst", backend, fused_shared_experts="on", activations="as-served")


def test_two_shared_experts_are_not_one(tmp_path):
    src = checkpoint(tmp_path / "src", n_shared_experts=2)
    ids = torch.arange(20).view(1, 20)
    expected = outputs(load(src), ids)[0]
    torch.testing.assert_close(outputs(load(src, "batched"), ids)[0], expected, rtol=0, atol=ATOL)
    with pytest.raises(UsageError, match="found 2 shared experts side by side"):
        load(src, "batched", fused_shared_experts="on")


def files_of(folder: Path) -> dict[str, str]:
    return {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}


def test_experts_in_different_schemes_are_multiplied_out(src, tmp_path):
    quantize(src, tmp_path / "dst", "fp8")
    for path in (tmp_path / "dst").glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if ".experts.1." in name and name.endswith(".weight")]:
            scale = tensors.pop(f"{name}_scale")
            tensors[name] = (tensors[name].float() * scale.float()).bfloat16()
        save_file(tensors, path)
    write_index(tmp_path / "dst", files_of(tmp_path / "dst"), 0)
    loaded, ids = load(tmp_path / "dst", "batched"), torch.arange(20).view(1, 20)
    assert {moe.local.weights.scheme for moe in blocks(loaded)} == {ExpertScheme.FP32}
    torch.testing.assert_close(outputs(loaded, ids)[0], outputs(load(tmp_path / "dst"), ids)[0], rtol=0, atol=ATOL)


def test_mtp_layer_may_have_a_scheme_of_its_own(src, tmp_path):
    quantize(src, tmp_path / "dst", "fp8", mtp="keep")
    loaded, ids = load(tmp_path / "dst", "batched"), torch.arange(20).view(1, 20)
    assert [moe.local.weights.scheme for moe in blocks(loaded)] == [ExpertScheme.FP8_CHANNEL, ExpertScheme.FP32]
    for ours, expected in zip(outputs(loaded, ids), outputs(load(tmp_path / "dst"), ids), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_no_expert_is_held_twice(src, num_shared):
    loaded = load(src, "batched", fused_shared_experts="on" if num_shared else "off")
    for moe in blocks(loaded):
        assert all(one.is_meta for one in moe.experts.parameters())
        assert all(one.is_meta == bool(num_shared) for one in moe.shared_experts.parameters())
        one_expert = sum(one.numel() for one in moe.experts[0].parameters())
        assert moe.local.weights.num_bytes == (3 + num_shared) * one_expert * 4
    first, *others = (moe.workspace for moe in blocks(loaded))
    assert all(other is first for other in others)


def test_alignment_is_asked_for_by_name(tmp_path):
    src = checkpoint(tmp_path / "src", moe_intermediate_size=18)
    with pytest.raises(UsageError) as error:
        load(src, "cutlass")
    assert str(error.value) == (
        "moe_backend 'cutlass': expected moe_intermediate_size to be a multiple of 4, found 18. Use --moe-backend "
        "batched."
    )
