"""Load checkpoints with vLLM's own model classes and loader, and say what became of every parameter.

    VLLM_PYTHON tests/consumers/vllm_load.py REPORT.json FOLDER...

For each folder the model and its MTP model are built from the folder's config.json and filled twice by vLLM's default
loader: first over bytes of 0xFF, then over bytes of 0x5A. A value that depends on what was there before was not loaded.
Then every parameter is held against the tensors of the files: what vLLM keeps as one, one after the other. Weights are
not put into the form of any kernel; nothing is computed.

Changed in vLLM, because a CPU has few kernels for quantized weights and a layer refuses to be built without one: the
kernels in `allow_kernels` say that they run on this device. Their other conditions (scheme, shapes, groups) still hold.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import PlatformEnum
from vllm.utils.torch_utils import set_default_torch_dtype

FILLS = (0xFF, 0x5A)
# their loader looks at what was there before: 1, or the scale of the other half of gate and up
COMPARED_WHILE_LOADED = ("w13_input_scale", "w2_input_scale")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
# what vLLM says when it does not take a checkpoint
REFUSALS = (ValueError, RuntimeError, KeyError, AttributeError, AssertionError, NotImplementedError, TypeError)


def allow_kernels() -> None:
    """Let kernels of other devices be chosen."""
    for registry, kernel in (
        (linear._POSSIBLE_FP8_BLOCK_KERNELS, linear.MarlinFP8ScaledMMLinearKernel),
        (linear._POSSIBLE_FP8_KERNELS, linear.MarlinFP8ScaledMMLinearKernel),
        (linear._POSSIBLE_NVFP4_KERNELS, linear.MarlinNvFp4LinearKernel),
    ):
        registry.setdefault(PlatformEnum.CPU, []).append(kernel)
        kernel.is_supported = classmethod(lambda cls, capability=None: (True, None))
    # its only conditions beside CUDA are sizes of groups
    linear._POSSIBLE_KERNELS[PlatformEnum.CPU] = [linear.MarlinLinearKernel]
    linear.MarlinLinearKernel.can_implement = classmethod(
        lambda cls, config: (config.group_size in (-1, 32, 64, 128), "group size")
    )
    for experts in (TritonExperts, MarlinExperts):
        experts._supports_current_device = staticmethod(lambda: True)
    # for INT8 it asks for a compute capability
    TritonExperts._supports_quant_scheme = staticmethod(lambda weight_key, activation_key: True)
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.MARLIN]


class Files:
    """The tensors of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.open = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self.where = {name: file for file in self.open for name in file.keys()}  # noqa: SIM118

    def values(self, name: str) -> torch.Tensor:
        return self.where[name].get_tensor(name).flatten().double()

    def __contains__(self, name: str) -> bool:
        return name in self.where


def stored_names(name: str, experts: int, files: Files) -> Iterator[str]:
    """Yield the tensors that make up a parameter of vLLM, in order."""
    name = name.replace(".mtp_block.", ".").replace(".routed_experts.", ".")
    module, _, last = name.rpartition(".")
    # of fused weights it keeps the shape of the last; it is not used
    kept = slice(-1, None) if last.endswith("weight_shape") else slice(None)
    if found := re.fullmatch(r"(w13|w2)_(.+)", last):
        for expert in range(experts):
            yield from (f"{module}.{expert}.{part}.{found[2]}" for part in EXPERTS[found[1]][kept])
        return
    above, _, own = module.rpartition(".")
    if own == "attn" and last in ("k_scale", "v_scale"):
        inside = f"{above}.{last[0]}_proj.{last}"
        yield inside if inside in files else f"{above}.{last}"
    elif name.endswith("shared_head.head.weight") and name not in files:
        yield "lm_head.weight"
    else:
        yield from (f"{above}.{part}.{last}".lstrip(".") for part in FUSED.get(own, (own,))[kept])


def loaded(config: Any, model_config: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return each parameter's two values, as vLLM's loader leaves them."""
    with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
        model = initialize_model(config, model_config=model_config)
    found: list[dict[str, torch.Tensor]] = []
    for fill in FILLS:
        for name, parameter in model.named_parameters():
            if name.endswith(COMPARED_WHILE_LOADED) and fill == FILLS[1]:
                parameter.data.fill_(1.0)
            else:
                parameter.data.view(-1).view(torch.uint8).fill_(fill)
        get_model_loader(config.load_config).load_weights(model, model_config)
        found.append({name: parameter.data.clone() for name, parameter in model.named_parameters()})
    return {name: (value, found[1][name]) for name, value in found[0].items()}


def holds(found: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Return whether a parameter is the tensors of the files one after the other, in its own dtype."""
    expected = torch.cat(parts)
    if len(expected) == 2 * len(found):
        # one value for gate and up
        expected, other = expected.view(-1, 2).unbind(1)
        if not torch.equal(expected, other):
            return False
    return torch.equal(expected.to(found.dtype), found)


def report_on(folder: Path, config: Any, model_config: Any, experts: int) -> dict[str, Any]:
    """Return what became of the parameters of one model."""
    try:
        parameters = loaded(config, model_config)
    except REFUSALS as error:
        return {"error": f"{type(error).__name__}: {error}"}
    files, used = Files(folder), set[str]()
    unfilled, differing = [], []
    for name, (first, second) in parameters.items():
        if not torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8)):
            unfilled.append(name)
            continue
        names = list(stored_names(name, experts, files))
        used |= set(names)
        if absent := [part for part in names if part not in files]:
            differing.append(f"{name}: no {absent[0]}")
        elif not holds(first.flatten(), [files.values(part) for part in names]):
            differing.append(name)
    return {"parameters": len(parameters), "unfilled": unfilled, "differing": differing, "used": sorted(used)}


def main() -> None:
    report_path, *folders = map(Path, sys.argv[1:])
    allow_kernels()
    result: dict[str, dict[str, Any]] = {}
    for folder in folders:
        raw = json.loads((folder / "config.json").read_text())
        args = EngineArgs(
            model=str(folder),
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=256,
            speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        )
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                with tempfile.NamedTemporaryFile(delete=False) as store:
                    init_distributed_environment(1, 0, f"file://{store.name}", 0, backend="gloo")
                initialize_model_parallel(1, 1)
            models = {"model": config.model_config, "mtp": config.speculative_config.draft_model_config}
            result[folder.name] = {
                name: report_on(folder, config, of, raw["n_routed_experts"]) for name, of in models.items()
            }
    report_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
