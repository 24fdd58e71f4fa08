"""The files beside the weights: an engine that finds another tokenizer or template runs another model."""

import filecmp
from collections.abc import Iterator
from pathlib import Path

from converters.config import read_json
from converters.conversion import passthrough_files
from converters.errors import ConfigError
from converters.findings import Finding, fail, warn
from converters.formats.declared import MODELOPT_FILE

# what an engine reads; a checkpoint that lost one of them does not answer as the source does
ENGINE_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    }
)
_GENERATION_FILE, _END_TOKENS = "generation_config.json", "eos_token_id"
# describes its own checkpoint, and no engine reads it
_README = "README.md"


def compare_files(source: Path, candidate: Path, *, is_dequantized: bool = False) -> Iterator[Finding]:
    """Yield what is missing or changed among the files that a conversion copies as they are.

    A file that describes a quantization is not missed where that is gone.

    Raises:
        SecurityError: such a file of the source is a link that leaves the repository.
    """
    for name in passthrough_files(source):
        copy = candidate / name
        if name == _README or (is_dequantized and name == MODELOPT_FILE):
            continue
        if not copy.is_file():
            report = fail if name in ENGINE_FILES else warn
            yield report(f"candidate: {name}", "as in the source", "no such file")
        elif not filecmp.cmp(source / name, copy, shallow=False):
            yield from _end_tokens(source / name, copy)
            yield warn(f"candidate: {name}", "the bytes of the source", "other bytes")


def _end_tokens(source: Path, copy: Path) -> Iterator[Finding]:
    """Yield that an engine would stop at other tokens: it goes by this file, not by config.json."""
    if copy.name != _GENERATION_FILE:
        return
    try:
        before, after = (read_json(path).get(_END_TOKENS) for path in (source, copy))
    except ConfigError as error:
        yield fail(f"candidate: {copy.name}", "a JSON object", str(error))
        return
    if before != after:
        yield fail(f"candidate: {copy.name}: {_END_TOKENS}", repr(before), "nothing" if after is None else repr(after))
