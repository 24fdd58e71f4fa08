"""The file of statistics: exact there and back, deterministic, never overwritten, and checked when it is read."""

import json
from dataclasses import replace

import pytest

from converters.errors import InputError, UsageError
from converters.quant.stats import CalibrationStats, coverage

Q, K = "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"
EXPERTS = [f"model.layers.3.mlp.experts.{index}.down_proj" for index in range(3)]
STATS = CalibrationStats(
    input_amax={Q: 3.4028234663852886e38, K: 0.1, **dict.fromkeys(EXPERTS, 1.401298464324817e-45)},
    key_amax={11: 2.5, 3: 7.0},
    value_amax={3: 1.0, 11: 0.0},
    tokens={Q: 100, K: 100, EXPERTS[0]: 40, EXPERTS[1]: 0, EXPERTS[2]: 60},
    filled={EXPERTS[1]: "largest of the layer's experts"},
    provenance={"model_digest": "0" * 64, "seed": 0},
    percentiles={Q: {"p99.9": 2.0, "p99.99": 3.0}},
)


def test_a_saved_file_gives_the_same_value_and_digest(tmp_path):
    path = tmp_path / "stats.json"
    STATS.save(path)
    again = CalibrationStats.load(path)
    assert again == STATS
    assert again.sha256 == STATS.sha256
    assert again.data == path.read_bytes()


def test_the_order_of_insertion_does_not_show():
    turned = replace(STATS, input_amax=dict(reversed(STATS.input_amax.items())), key_amax={3: 7.0, 11: 2.5})
    assert turned.data == STATS.data
    assert json.loads(turned.data)["modules"][K] == {"input_amax": 0.1, "tokens": 100}


def test_the_same_statistics_may_be_saved_again_and_others_not(tmp_path):
    path = tmp_path / "stats.json"
    STATS.save(path)
    STATS.save(path)
    with pytest.raises(UsageError, match="nothing is overwritten"):
        replace(STATS, tokens={**STATS.tokens, Q: 101}).save(path)
    assert path.read_bytes() == STATS.data
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_coverage_sums_up_a_layers_experts():
    (row,) = coverage(STATS.tokens, STATS.filled)
    assert (row.layer, row.experts, row.min_tokens, row.median_tokens, row.filled) == (3, 3, 0, 40, 1)


def test_no_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="glm4moe calibrate"):
        CalibrationStats.load(tmp_path / "none.json")


def change_module(raw, **facts):
    raw["modules"][Q] |= facts


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(schema="glm4moe.stats/2"),
        lambda raw: raw.pop("modules"),
        lambda raw: raw.update(layers=[]),
        lambda raw: raw["layers"].update({"03": {"key_amax": 1.0, "value_amax": 1.0}}),
        lambda raw: raw["layers"].update({"4": {"key_amax": 1.0}}),
        lambda raw: raw["modules"].update({"model.layers.3.other": raw["modules"][Q]}),
        lambda raw: raw["modules"][Q].pop("tokens"),
        lambda raw: change_module(raw, input_amax=-1.0),
        lambda raw: change_module(raw, input_amax="1"),
        lambda raw: change_module(raw, input_amax=1e999),
        lambda raw: change_module(raw, tokens=1.5),
        lambda raw: change_module(raw, filled=1),
        lambda raw: change_module(raw, amin=0.0),
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path, change):
    raw = json.loads(STATS.data)
    change(raw)
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError):
        CalibrationStats.load(path)
