"""Causes that config.json and the files beside the weights show."""

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters.compare_files import ENGINE_FILES
from converters.config import CONFIG_FILE, Glm4MoeConfig, read_json
from converters.diagnosis.cause import Cause, CauseCode
from converters.errors import ConfigError

TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
_EOS = "eos_token_id"
# fields that say what the model computes, and what another value of them does
_EFFECTS = {
    "rms_norm_eps": "every norm adds another epsilon",
    "rope_theta": "rotary positions turn at other speeds",
    "partial_rotary_factor": "rotary positions cover other dims of each head",
    "routed_scaling_factor": "the sum of routed experts gets another weight",
    "norm_topk_prob": "routing weights are normalized otherwise",
    "num_experts_per_tok": "each token goes to another number of experts",
    "n_group": "experts are chosen from other groups",
    "topk_group": "experts are chosen from other groups",
    "head_dim": "heads are cut otherwise",
    "num_attention_heads": "heads are cut otherwise",
    "num_key_value_heads": "key-value heads are shared otherwise",
    "use_qk_norm": "queries and keys are normed otherwise",
    "attention_bias": "attention has its biases or not",
    "first_k_dense_replace": "other layers are dense",
    "max_position_embeddings": "engines allow another context length",
    "tie_word_embeddings": "engines take the embedding for the head and leave the head's own weights out",
    "hidden_act": "the activation is another one",
}
_BESIDES = frozenset({"dtype", "vocab_size", "num_nextn_predict_layers", _EOS})
_REFUSED = ("tie_word_embeddings", "hidden_act", "scoring_func", "topk_method")


def config_causes(source: Path, candidate: Path) -> Iterator[Cause]:
    """Yield the fields of config.json by which the candidate is another model."""
    before, after = (_fields(read_json(folder / CONFIG_FILE)) for folder in (source, candidate))
    for name in dict.fromkeys((*before, *_REFUSED)):
        old, new = before.get(name), after.get(name)
        # a field that this tool does not know is only told where it was refused
        if name in _BESIDES or old == new or (name in _REFUSED and new is None):
            continue
        statement = f"{_EFFECTS.get(name, 'the model is another one')}: {new!r} instead of {old!r}"
        if name == "routed_scaling_factor" and new == 1:
            statement = f"routed_scaling_factor is lost: 1 instead of {old!r}"
        yield _field_cause(CauseCode.CONFIG, CONFIG_FILE, name, (old, new), statement)
    if before.get(_EOS) != after.get(_EOS):
        yield _eos_cause(CONFIG_FILE, before.get(_EOS), after.get(_EOS))


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config means; of one that is not supported, what stands in it."""
    refused = {name: raw[name] for name in _REFUSED if name in raw}
    try:
        return {**asdict(Glm4MoeConfig.from_hf(raw)), **refused}
    except ConfigError:
        allowed = {name: value for name, value in raw.items() if name not in _REFUSED}
        try:
            return {**asdict(Glm4MoeConfig.from_hf(allowed)), **refused}
        except ConfigError:
            return dict(raw)


def _field_cause(code: CauseCode, file: str, name: str, values: tuple[Any, Any], statement: str) -> Cause:
    told = f"{name} is {values[1]!r}, in the source {values[0]!r}"
    return Cause(code, f"{file}: {name}", statement, told, f"Take {name} from the source's {file}.")


def _eos_cause(file: str, before: Any, after: Any) -> Cause:
    old, new = _ids(before), _ids(after)
    lost = [token for token in old if token not in new]
    words = f"generation does not stop at {', '.join(map(str, lost))}" if lost else "generation stops at other tokens"
    return _field_cause(CauseCode.EOS_LOST, file, _EOS, (list(old), list(new)), words)


def _ids(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def file_causes(source: Path, candidate: Path) -> Iterator[Cause]:
    """Yield the files beside the weights by which an engine would run another model."""
    for name in sorted(ENGINE_FILES):
        before, after = source / name, candidate / name
        if not before.is_file() or (after.is_file() and filecmp.cmp(before, after, shallow=False)):
            continue
        if not after.is_file():
            words, told = "it is gone", "in the source, not in the candidate"
            code = CauseCode.TEMPLATE_CHANGED if name == TEMPLATE_FILE else CauseCode.FILE_CHANGED
            yield Cause(code, name, words, told, f"Copy {name} from the source.")
        elif name == GENERATION_FILE:
            yield from _generation_causes(before, after)
        else:
            code = CauseCode.TEMPLATE_CHANGED if name == TEMPLATE_FILE else CauseCode.FILE_CHANGED
            what = "chats are put into other words" if name == TEMPLATE_FILE else "its content is another one"
            yield Cause(code, name, what, _first_difference(before, after), f"Copy {name} from the source.")


def _generation_causes(before: Path, after: Path) -> Iterator[Cause]:
    try:
        old, new = read_json(before), read_json(after)
    except ConfigError as error:
        yield Cause(
            CauseCode.FILE_CHANGED, GENERATION_FILE, "it cannot be read", str(error), "Copy it from the source."
        )
        return
    for name in sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        if name == _EOS:
            yield _eos_cause(GENERATION_FILE, old.get(name), new.get(name))
        else:
            values, words = (old.get(name), new.get(name)), "engines sample with another default"
            yield _field_cause(CauseCode.FILE_CHANGED, GENERATION_FILE, name, values, words)


def _first_difference(before: Path, after: Path) -> str:
    old, new = (path.read_bytes().splitlines() for path in (before, after))
    line = next((n for n, (a, b) in enumerate(zip(old, new, strict=False), 1) if a != b), min(len(old), len(new)) + 1)
    return f"{before.stat().st_size} and {after.stat().st_size} bytes, first different in line {line}"
