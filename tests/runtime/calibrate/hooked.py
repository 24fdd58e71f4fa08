"""What transformers' own modules see: the reference that calibration is held against."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts


@dataclass
class Seen:
    """Inputs of every linear module by official name, and the tokens of each expert."""

    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor) -> None:
        self.inputs.setdefault(name, []).append(value.detach().reshape(-1, value.shape[-1]))

    def amax(self, name: str) -> float:
        return max((float(part.abs().max()) for part in self.inputs[name] if part.numel()), default=0.0)

    def magnitudes(self, name: str) -> torch.Tensor:
        return torch.cat([part.abs().flatten() for part in self.inputs[name]])

    def rows(self, name: str) -> int:
        return sum(len(part) for part in self.inputs[name])


@contextmanager
def hooked(model: nn.Module, seen: Seen, rename: dict[str, str]) -> Iterator[None]:
    """Record the inputs of a model's linear modules; names lose and gain the prefixes of `rename`."""
    handles = []
    for name, module in model.named_modules():
        official = next((new + name[len(old) :] for old, new in rename.items() if name.startswith(old)), None)
        if official is None:
            continue
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda m, a, n=official: seen.add(n, a[0])))
        elif isinstance(module, Glm4MoeExperts):
            handles.append(module.register_forward_pre_hook(lambda m, a, n=official: _experts(seen, n, m, *a)))
    yield
    for handle in handles:
        handle.remove()


def _experts(seen: Seen, name: str, experts: Glm4MoeExperts, hidden: torch.Tensor, ids: torch.Tensor, *_) -> None:
    """Transformers keeps all experts in one parameter, so that their inputs are worked out here."""
    for expert, (gate_up, _down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        rows = hidden[(ids == expert).any(1)]
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        seen.add(f"{name}.{expert}.gate_proj", rows)
        seen.add(f"{name}.{expert}.up_proj", rows)
        seen.add(f"{name}.{expert}.down_proj", F.silu(gate) * up)
