"""What a quantization cost: measured errors of the weights, as the result's manifest records them."""

from collections.abc import Mapping
from pathlib import Path

from converters.checkpoint.manifest import read_manifest
from converters.quant.quality import SAMPLE_EVERY, TensorQuality, by_role, mean, worst

WORST = 10
TITLE = f"Errors of the weights, on every {SAMPLE_EVERY}th row"


def written_quality(dst: Path) -> dict[str, TensorQuality]:
    """Return the errors of every quantized tensor of a finished folder; {} if there are none."""
    manifest = read_manifest(dst)
    tensors = manifest["tensors"] if manifest else {}
    return {name: TensorQuality(**tensor["quality"]) for name, tensor in tensors.items() if "quality" in tensor}


def quality_facts(quality: Mapping[str, TensorQuality]) -> dict[str, object]:
    """Return the mean by role, then the worst tensors, as names and values for people."""
    roles: dict[str, object] = {
        f"{role}, mean of {len(found)}": _shown(mean(found)) for role, found in by_role(quality).items()
    }
    return roles | {name: _shown(figures) for name, figures in worst(quality, WORST)}


def quality_json(quality: Mapping[str, TensorQuality]) -> dict[str, object]:
    """Return the same as JSON has it, with every tensor."""
    return {
        "sampled_rows": f"1 of {SAMPLE_EVERY}",
        "by_role": {role: mean(found) for role, found in by_role(quality).items()},
        "worst": [name for name, _ in worst(quality, WORST)],
        "tensors": quality,
    }


def _shown(figures: TensorQuality) -> str:
    return f"relative error {figures.relative_error:.4f}, SQNR {figures.sqnr_db:.1f} dB, clipped {figures.clipped:.2%}"
