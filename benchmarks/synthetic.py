"""Make a synthetic checkpoint with the real layer shapes of a released model, several GB large, with random weights.

    python benchmarks/synthetic.py DIR [--model GLM-4.5-Air] [--moe-layers 1] [--experts 64] [--shard-bytes 5000000000]

One dense layer, the given MoE layers and the MTP layer; the vocabulary is reduced. By default 6.54 GB. Random bf16 with
the spread of real weights, generated once per shape and rolled for each tensor, so that making it costs little more
than writing it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from converters.checkpoint.header import build_header
from converters.config import Glm4MoeConfig
from converters.schema import DtypePolicy, Tensor, expand

CONFIGS = Path(__file__).resolve().parent.parent / "fixtures" / "configs"


def synthetic_config(moe_layers: int, experts: int, vocab_size: int, model: str = "GLM-4.5-Air") -> dict:
    """Return a released model's config with fewer layers, experts and tokens; every other size is the real one."""
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    changed = {"num_hidden_layers": 1 + moe_layers, "n_routed_experts": experts, "vocab_size": vocab_size}
    return config | changed | {"first_k_dense_replace": 1}


def random_bytes(tensor: Tensor, pool: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the tensor's little-endian bytes: fp32 for the correction bias, else bf16 cut out of the pool."""
    if tensor.spec.dtype is DtypePolicy.KEEP_FP32:
        # small beside scores between 0 and 1: a large one would send all tokens to the same experts
        return (0.01 * generator.standard_normal(tensor.numel)).astype(np.float32).view(np.uint8)
    repeats = -(-tensor.numel // len(pool))
    start = int(generator.integers(len(pool)))
    return np.tile(np.roll(pool, start), repeats)[: tensor.numel].view(np.uint8)


def write_synthetic(folder: Path, config: dict, shard_bytes: int) -> int:
    """Write the checkpoint; return its bytes of tensor data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = list(expand(Glm4MoeConfig.from_hf(config), mtp_copies=False).tensors.values())
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(2 * t.numel for t in groups[-1]) + 2 * tensor.numel > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    generator = np.random.default_rng(0)
    normal = (generator.standard_normal(1 << 22) * 0.02).astype(np.float32)
    pool = (normal.view(np.uint32) >> 16).astype(np.uint16)
    weight_map, total = {}, 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        fp32_first = sorted(group, key=lambda t: t.spec.dtype is not DtypePolicy.KEEP_FP32)
        names = [(t.name, "F32" if t.spec.dtype is DtypePolicy.KEEP_FP32 else "BF16", t.shape) for t in fp32_first]
        header, entries = build_header(names)
        with (folder / file).open("wb") as out:
            out.write(header)
            for tensor in fp32_first:
                out.write(random_bytes(tensor, pool, generator).data)
        weight_map |= {entry.name: file for entry in entries}
        total += sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    """Write one checkpoint and print its bytes of tensor data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="GLM-4.5-Air")
    parser.add_argument("--moe-layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=64_000)
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    args = parser.parse_args()
    config = synthetic_config(args.moe_layers, args.experts, args.vocab_size, args.model)
    print(write_synthetic(args.folder, config, args.shard_bytes))


if __name__ == "__main__":
    main()
