"""What kernels of the triton backend make of a row, bit for bit: in any batch, and with codes made in any launch."""

from dataclasses import replace

import torch

from converters.config import Glm4MoeConfig
from converters.formats.inputs import InputCode, InputScheme
from runtime.model.activations import InputQuantizer
from runtime.model.norm import RMSNorm
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import CalibratedInputs, LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_inputs import FusedInputs
from runtime.moe.fused_ops import FusedOps
from runtime.moe.inputs import Inputs, QuantizedRows
from runtime.moe.layouts import masked_rows
from runtime.moe.plan import TRITON, LayerPlan, MoePlan
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace
from tests.builders import small_config
from tests.runtime.moe.expert_layers import random_experts, random_slots
from tests.runtime.moe.moe_blocks import filled_moe

H, I, E, K, T = 128, 128, 4, 2, 40  # noqa: E741
CPU = torch.device("cpu")
FP8, FP8_GROUPS, INT8 = InputScheme(InputCode.FP8), InputScheme(InputCode.FP8, 128), InputScheme(InputCode.INT8)
NVFP4 = InputScheme(InputCode.NVFP4, 16, is_static=True)
# schemes of weights, and what inputs are rounded to
KINDS: dict[str, tuple[ExpertScheme, InputScheme | None]] = {
    "bf16": (ExpertScheme.BF16, None),
    "fp8-channel": (ExpertScheme.FP8_CHANNEL, None),
    "fp8-channel, codes": (ExpertScheme.FP8_CHANNEL, FP8),
    "fp8-block, codes": (ExpertScheme.FP8_BLOCK, FP8_GROUPS),
    "int8-channel": (ExpertScheme.INT8_CHANNEL, None),
    "int8-w8a8, codes": (ExpertScheme.INT8_W8A8, INT8),
    "nvfp4": (ExpertScheme.NVFP4, None),
    "nvfp4, codes": (ExpertScheme.NVFP4, NVFP4),
}


def factors(kind: str) -> list[float]:
    """Return a calibrated factor for each expert, the shared one included: no powers of two."""
    start = {"up": 300.0, "down": 90.0}[kind]
    return [start * (1 + expert / 7) for expert in range(E + 1)]


def local_experts(scheme: ExpertScheme, inputs: InputScheme | None, num_routed: int = E) -> LocalExperts:
    """Return experts whose inputs kernels take as they are, or as codes."""
    weights = random_experts(scheme, num_routed, 1, H, I)
    if inputs is NVFP4:
        calibrated = CalibratedInputs.of(factors("up"), CPU), CalibratedInputs.of(factors("down"), CPU)
        return LocalExperts(weights, multiplies_codes=True, calibrated=calibrated)
    rounding = None if inputs is None else InputQuantizer(inputs)
    return LocalExperts(weights, rounding, rounding, multiplies_codes=inputs is not None)


def config(num_routed: int = E) -> Glm4MoeConfig:
    sizes = {"n_routed_experts": num_routed, "num_experts_per_tok": K, "hidden_size": H, "moe_intermediate_size": I}
    return replace(Glm4MoeConfig.from_hf(small_config()), **sizes, n_group=1, topk_group=1)


def block(experts: LocalExperts, *, is_batch_invariant: bool) -> MoE:
    """Return a whole block, router included."""
    plan = MoePlan(TRITON, {5: LayerPlan(experts.weights.scheme, 1)}, is_batch_invariant)
    num_routed = experts.weights.num_routed
    moe, g = MoE(config(num_routed), 5, plan), torch.Generator().manual_seed(2)
    for name, shape in (("weight", (num_routed, H)), ("e_score_correction_bias", (num_routed,))):
        setattr(moe.gate, name, torch.nn.Parameter(torch.randn(shape, generator=g) / 4, requires_grad=False))
    moe.load(experts, Workspace(CPU))
    return moe


def dependent(moe: MoE, dtype: torch.dtype) -> int:
    """Return how many rows of parts of a batch, one of them in another order, are not those of the whole."""
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole, order = moe(hidden[None], None)[0].clone(), torch.arange(T)
    parts = [order[5:6], order[5:8], order[5:22].flip(0)]
    return sum(int((moe(hidden[part][None], None)[0] != whole[part]).any(1).sum()) for part in parts)


def dependent_rows() -> dict[str, int]:
    """Return dependent rows by kind, and of a block whose tiles follow the number of tokens."""
    found = {
        name: dependent(block(local_experts(scheme, inputs), is_batch_invariant=True), torch.bfloat16)
        for name, (scheme, inputs) in KINDS.items()
    }
    # of eight experts two are chosen: one token is multiplied without tiles
    free = block(local_experts(ExpertScheme.FP32, None, num_routed=8), is_batch_invariant=False)
    return found | {"tiles by tokens": dependent(free, torch.float32)}


def different_codes() -> int:
    """Return how many codes and scales `up` makes otherwise than a launch of its own does, behind stored results."""
    experts, slots = local_experts(ExpertScheme.FP8_BLOCK, FP8_GROUPS), random_slots(6, E, K)
    ops, rows = FusedOps.of_kernels(), masked_rows(slots.ids_TK, E + 1, 6)
    hidden, made = torch.randn(6, H).bfloat16(), list[QuantizedRows]()
    backend = FusedExperts(ops)
    for writes_codes in (True, False):
        inputs = FusedInputs(ops, experts, rows, Workspace(CPU))
        active: Inputs = inputs.room(torch.bfloat16, writes_codes=writes_codes)
        assert isinstance(active, QuantizedRows) is writes_codes
        tiles = backend._tiles(hidden, slots, experts)
        ops.up(inputs.of_tokens(hidden), experts.weights, rows, active, tiles.up, rounded_to=torch.bfloat16)
        codes = inputs.of_activations(active)
        assert isinstance(codes, QuantizedRows)
        made.append(codes)
    used = (rows.slots >= 0).flatten()
    bytes_ = [torch.cat((one.codes.view(torch.uint8), one.scales.view(torch.uint8)), 1)[used] for one in made]
    assert bytes_[0].any()
    return int((bytes_[0] != bytes_[1]).sum())


def fp4_difference(num_tokens: int, *, is_masked: bool) -> float:
    """Return how far products of NVFP4 codes are from those of rounded inputs, as a share of what rounding changes."""
    experts = local_experts(ExpertScheme.NVFP4, NVFP4)
    hidden, slots = torch.randn(num_tokens, H), random_slots(num_tokens, E, K)
    out = torch.empty_like(hidden)
    FusedExperts(FusedOps.of_kernels(), is_masked=is_masked).run(hidden, slots, experts, Workspace(CPU), out)
    values, full = (by_slots(hidden, slots, experts, is_rounded=is_rounded) for is_rounded in (True, False))
    return float((out - values).abs().mean() / (full - values).abs().mean())


def by_slots(hidden: torch.Tensor, slots: Slots, experts: LocalExperts, *, is_rounded: bool) -> torch.Tensor:
    """Return the layer slot by slot, each expert's inputs rounded by its own scale."""
    up, down = experts.weights.up_values(torch.float32), experts.weights.down_values(torch.float32)
    total = torch.zeros_like(hidden)
    for token, ids in enumerate(slots.ids_TK.tolist()):
        for choice, expert in enumerate(ids):
            first, second = (InputQuantizer(NVFP4, factors(kind)[expert]) for kind in ("up", "down"))
            row = hidden[token : token + 1]
            both = (first(row) if is_rounded else row) @ up[expert].T
            active = torch.nn.functional.silu(both[:, 0::2]) * both[:, 1::2]
            result = (second(active) if is_rounded else active) @ down[expert].T
            total[token] += slots.weights_TK[token, choice] * result[0]
    return total


def norm_differences() -> dict[str, float]:
    """Return how far residual and norm are from those behind the block, relative to their size, by tokens."""
    small, found = replace(config(), hidden_size=64, moe_intermediate_size=32), {}
    moe = filled_moe(small, MoePlan(TRITON, {5: LayerPlan(ExpertScheme.FP32, 1)}))
    norm = RMSNorm(small.hidden_size, 1e-5)
    norm.weight = torch.nn.Parameter(torch.rand(small.hidden_size) + 0.5, requires_grad=False)
    for num_tokens in (1, 5):
        hidden, residual = torch.randn(2, 1, num_tokens, small.hidden_size)
        expected = norm.add(residual, moe(hidden, None))
        out = torch.empty_like(hidden), torch.empty_like(hidden)
        moe.forward_and_norm(hidden, None, residual, norm, out)
        for name, ours, theirs in zip(("sum", "norm"), out, expected, strict=True):
            found[f"{name} {num_tokens}"] = float((ours - theirs).abs().max() / theirs.abs().max())
    return found
