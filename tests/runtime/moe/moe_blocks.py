"""A MoE block of layer 5 with random fp32 weights, in modules or in grouped layout."""

import torch
from torch import nn

from converters.config import Glm4MoeConfig
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
