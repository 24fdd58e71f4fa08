"""A MoE block of layer 5 with random weights, in modules or in grouped layout, in fp32 or in any scheme."""

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from converters.numerics.fp8 import Arithmetic, quantize_channel
from runtime.model.linear import Linear, Rounding
from runtime.moe.expert_map import ExpertShare
from runtime.moe.experts import LocalExperts
from runtime.moe.packing import ExpertPacker, Matrix, Sizes
from runtime.moe.plan import VANILLA_PLAN, MoePlan
from runtime.moe.runner import MoE
from runtime.moe.workspace import Workspace


def filled_moe(config: Glm4MoeConfig, plan: MoePlan = VANILLA_PLAN, share: ExpertShare | None = None) -> MoE:
    """Return a block whose weights do not depend on the plan; modules are filled in any case, for comparison."""
    generator = torch.Generator().manual_seed(0)
    moe = MoE(config, 5, plan, share)
    for name, parameter in list(moe.named_parameters()):
        module, _, attribute = name.rpartition(".")
        value = nn.Parameter(torch.randn(parameter.shape, generator=generator) * 0.3, requires_grad=False)
        setattr(moe.get_submodule(module), attribute, value)
    if plan.layers:
        layer, num_routed = plan.layers[5], config.n_routed_experts
        held = range(num_routed + layer.num_shared) if share is None else share.held
        num_shared = sum(expert == num_routed for expert in held)
        sizes = Sizes(len(held) - num_shared, num_shared, config.hidden_size, config.moe_intermediate_size)
        packer = ExpertPacker(layer.scheme, sizes, torch.device("cpu"))
        mlps = [*moe.experts, moe.shared_experts]
        for local, expert in enumerate(held):
            mlp = mlps[expert]
            for matrix, linear in zip(Matrix, (mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True):
                packer.put(local, matrix, linear.weight)
        moe.load(LocalExperts(packer.weights()), Workspace(torch.device("cpu")))
    return moe


class PoisonedWorkspace(Workspace):
    """What a buffer held is gone when it is taken again: whoever still needed it gets NaN, or an index far outside."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = Workspace.take(self, name, shape, dtype)
        if dtype.is_floating_point:
            return found.fill_(float("nan"))
        return found.fill_(True if dtype is torch.bool else min(torch.iinfo(dtype).max, 1 << 30))


def fill_linear(
    linear: Linear, dtype: torch.dtype, generator: torch.Generator, rounding: Rounding | None = None
) -> None:
    """Put random weights into a layer: of a float dtype, or FP8 codes with a scale for each row."""
    weight = torch.randn(linear.weight.shape, generator=generator) * 0.1
    if dtype is torch.float8_e4m3fn:
        weight, scale = quantize_channel(weight, Arithmetic.FLOAT32)
        linear.add_weight_scale()
        linear.weight_scale = nn.Parameter(scale, requires_grad=False)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.quantize_input = rounding


def coded_moe(
    config: Glm4MoeConfig, plan: MoePlan, local: LocalExperts, shared: torch.dtype, rounding: Rounding | None = None
) -> MoE:
    """Return a block with these experts; one of its own, if it has one, has weights of a dtype and rounded inputs."""
    generator, moe = torch.Generator().manual_seed(0), MoE(config, 5, plan)
    for name in ("weight", "e_score_correction_bias"):
        value = torch.randn(getattr(moe.gate, name).shape, generator=generator) * 0.1
        setattr(moe.gate, name, nn.Parameter(value, requires_grad=False))
    mlp = moe.shared_experts
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        fill_linear(linear, shared, generator, rounding)
    moe.load(local, Workspace(torch.device("cpu")))
    return moe
