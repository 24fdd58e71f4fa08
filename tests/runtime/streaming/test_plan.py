"""The memory of a comparison, planned from headers: a 355B model against its FP8 copy on a small machine."""

from pathlib import Path

import pytest

from converters.config import Glm4MoeConfig
from converters.errors import ResourceError
from converters.schema import expand
from runtime.streaming import plan
from runtime.streaming.options import LAYERS, StreamOptions
from runtime.streaming.plan import StreamMemory
from runtime.verify.streamed import planned
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import plan_windows
from tests.converters.inspect.fakes import config_of, official, per_channel, quantized_config

GIB = 1 << 30
NUM_TOKENS = 4096


def text(num_tokens: int) -> EncodedText:
    return EncodedText(tuple(range(num_tokens)), plan_windows(num_tokens, context_length=512))


def planned_memory(root: Path, num_layers: int) -> tuple[StreamMemory, int]:
    """Return the plan for GLM-4.6 with so many layers against its FP8 copy, and how many parameters both have."""
    config = config_of("GLM-4.6") | {"num_hidden_layers": num_layers}
    schema = expand(Glm4MoeConfig.from_hf(config), mtp_copies=False)
    folder, coded = root / str(num_layers), per_channel(schema, "F32")
    official(folder / "source", config, mtp_copies=False)
    official(folder / "fp8", quantized_config(config, schema), mtp_copies=False, stored=coded)
    with planned(folder / "source", folder / "fp8", text(NUM_TOKENS), StreamOptions()) as job:
        return job.memory, len(schema.tensors) + len(coded)


def test_glm_4_6_against_its_fp8_copy_fits_8_gib(tmp_path):
    """All MoE layers are alike: more of them change nothing but the size of the two empty models."""
    few, _ = planned_memory(tmp_path, 4)
    more, parameters = planned_memory(tmp_path, 5)
    assert few.weights == more.weights
    assert (few.activations, few.head, few.hidden) == (more.activations, more.head, more.hidden)
    # names of both sides but for embeddings
    assert more.base == plan._PROGRAM_BYTES + plan._PARAMETER_BYTES * parameters
    config = config_of("GLM-4.6")
    assert config["num_hidden_layers"] == 92
    schema = expand(Glm4MoeConfig.from_hf(config), mtp_copies=False)
    whole = plan._PROGRAM_BYTES + plan._PARAMETER_BYTES * (len(schema.tensors) + len(per_channel(schema, "F32")))
    assert more.peak_bytes - more.base + whole < 6 * GIB
    assert not more.hidden_on_disk
    # both models have hidden states, sums and the MTP layer's states, the forced one sums; the floor's two lanes have
    # 2 and 3 of one window
    assert more.hidden == (7 * NUM_TOKENS + 5 * 512) * 5120 * 4
    # attention, dense MLP, and the next layer's attention of both models, in bf16 and FP8
    assert 1 * GIB < more.weights < 2 * GIB


def small_memory(folder: Path, num_tokens: int = 60, **options: object) -> StreamMemory:
    read = EncodedText((1,) * num_tokens, plan_windows(num_tokens, context_length=20))
    with planned(folder, folder, read, StreamOptions(**options)) as job:
        return job.memory


def test_what_does_not_fit_goes_to_disk_or_is_refused(make_small):
    folder = make_small("model")
    memory = small_memory(folder)
    least = memory.peak_bytes - memory.hidden
    on_disk = small_memory(folder, max_memory=least)
    assert (on_disk.peak_bytes, on_disk.scratch_bytes) == (least, memory.hidden)
    with pytest.raises(ResourceError, match=f"--max-memory: expected at least {least} bytes"):
        small_memory(folder, max_memory=least - 1)


def test_tokens_cost_hidden_states_and_decisions_only(make_small):
    folder = make_small("model")
    few, many = (small_memory(folder, tokens, floor=False) for tokens in (60, 120))
    assert many.hidden == 2 * few.hidden == 2 * 7 * 60 * 48 * 4
    assert many.routing == 2 * few.routing
    assert (many.weights, many.head, many.activations) == (few.weights, few.head, few.activations)


def test_layers_alone_need_the_heads_too(make_small):
    """They are compared on the reference's final hidden states."""
    folder = make_small("model")
    alone, with_scores = small_memory(folder, levels=frozenset({LAYERS})).head, small_memory(folder).head
    head_bytes = 2 * 64 * 48 * 4
    assert head_bytes < alone < with_scores


def test_more_readers_hold_more(make_small):
    folder = make_small("model")
    assert small_memory(folder, workers=4).weights > small_memory(folder).weights
