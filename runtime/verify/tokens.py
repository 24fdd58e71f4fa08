"""The tokens that models are compared on: of texts, or ready-made ids; and the windows they are fed in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.checkpoint.disk_read import open_file, read_exactly, read_file
from converters.checkpoint.dtypes import torch_dtype
from converters.checkpoint.header import read_header
from converters.config import Glm4MoeConfig
from converters.errors import InputError, UsageError
from runtime.engine.tokenizer import TOKENIZER_FILE, Tokenizer
from runtime.verify.windows import TEXT_OPTION, WindowPlan, plan_texts

if TYPE_CHECKING:
    import torch

TOKENS_OPTION = "--tokens"
# what a safetensors file of tokens calls them
TOKEN_IDS = "token_ids"
# 32 million ids as int64; a comparison takes a thousandth of that
_MAX_FILE_BYTES = 256 << 20
TokenLists = tuple[tuple[int, ...], ...]


class WindowSizes(Protocol):
    """What decides the windows; see `plan_texts`."""

    @property
    def context_length(self) -> int:
        """Most tokens of a window."""

    @property
    def stride(self) -> int | None:
        """Tokens from one window to the next."""

    @property
    def num_tokens(self) -> int | None:
        """Use this many tokens."""

    @property
    def seed(self) -> int:
        """Of the draws."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids that are run, by the source's tokenizer, and the windows they are fed in."""

    token_ids: tuple[int, ...]
    plan: WindowPlan


def encode_text(source: Path, text: str, options: WindowSizes) -> EncodedText:
    """Encode a text and cut it into windows; no weight is read.

    Raises:
        UsageError: sizes that leave nothing to score, or that the model's context cannot hold.
        InputError: no usable tokenizer, or one that gives ids which the model lacks.
    """
    return encode_texts(source, [text], options)


def encode_texts(source: Path, texts: Sequence[str], options: WindowSizes, *, origin: str = "") -> EncodedText:
    """Encode texts, none of which shares a window with another; see `encode_text`.

    Args:
        source: checkpoint folder whose tokenizer is used.
        texts: one or more.
        options: sizes of the windows; see `plan_texts`.
        origin: what the texts are, for the protocol.
    """
    config = _config(source, options)
    tokenizer = Tokenizer.open(source)
    lists = tuple(tuple(tokenizer.encode(text)) for text in texts)
    encoded = _cut(lists, options, TEXT_OPTION, origin)
    _check_ids(lists, config, InputError(str(source / TOKENIZER_FILE), next_step="This is another model's tokenizer."))
    return encoded


def encode_tokens(source: Path, path: Path, options: WindowSizes) -> EncodedText:
    """Take ready-made token ids from a file; see `load_tokens`. Each list has windows of its own.

    Raises:
        UsageError: the file holds no token ids of this model, or sizes leave nothing to score.
    """
    config, lists = _config(source, options), load_tokens(path)
    _check_ids(
        lists, config, UsageError(f"{TOKENS_OPTION} {path}", next_step="They were made by another model's tokenizer.")
    )
    return _cut(lists, options, f"{TOKENS_OPTION} {path}", f"token ids of {path.name}")


def load_tokens(path: Path) -> TokenLists:
    """Read token ids: one list, or several.

    `.json`: a list of ids, or a list of such lists. `.npy`: an array of integers, (T,) or (N, T). `.safetensors`: the
    same as the tensor `token_ids`.

    Raises:
        UsageError: another kind of file, or other contents. InputError: a damaged file.
    """
    readers = {".json": _read_json, ".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise UsageError(f"{TOKENS_OPTION} {path}", expected=f"a file of {', '.join(readers)}", found=path.suffix)
    size = path.stat().st_size if path.is_file() else None
    if size is None or size > _MAX_FILE_BYTES:
        raise _refusal(path, f"a file of at most {_MAX_FILE_BYTES >> 20} MiB", "none" if size is None else f"{size}")
    lists = readers[path.suffix](path)
    negative = next((token for ids in lists for token in ids if token < 0), None)
    if negative is not None:
        raise _refusal(path, "token ids from 0", str(negative))
    return lists


def _config(source: Path, options: WindowSizes) -> Glm4MoeConfig:
    config = Glm4MoeConfig.from_folder(source)
    if options.context_length > config.max_position_embeddings:
        raise UsageError(
            "--context-length",
            expected=f"at most {config.max_position_embeddings}, the model's own",
            found=str(options.context_length),
        )
    return config


def _cut(lists: TokenLists, options: WindowSizes, subject: str, origin: str) -> EncodedText:
    plan, spans = plan_texts(
        [len(ids) for ids in lists],
        context_length=options.context_length,
        stride=options.stride,
        num_tokens=options.num_tokens,
        seed=options.seed,
        subject=subject,
    )
    everything = [token for ids in lists for token in ids]
    taken = tuple(token for span in spans for token in everything[span.start : span.stop])
    return EncodedText(taken, replace(plan, origin=origin))


def _check_ids(lists: TokenLists, config: Glm4MoeConfig, error: InputError | UsageError) -> None:
    """Raise an error of the kind and subject given where an id lies outside the vocabulary."""
    largest = max((max(ids) for ids in lists if ids), default=0)
    if largest >= config.vocab_size:
        raise type(error)(
            error.subject,
            expected=f"token ids below vocab_size {config.vocab_size}",
            found=str(largest),
            next_step=error.next_step,
        )


def _read_json(path: Path) -> TokenLists:
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "JSON", str(error)) from error
    if _are_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value and all(_are_ids(item) for item in value):
        return tuple(map(tuple, value))
    raise _refusal(path, "a list of token ids, or a list of such lists", "something else")


def _are_ids(value: Any) -> bool:
    # bool is an int to isinstance
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _read_npy(path: Path) -> TokenLists:
    import numpy as np

    try:
        array = np.load(path, mmap_mode=None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _refusal(path, "an array of integers", str(error)) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise _refusal(path, "an array of integers, (T,) or (N, T)", f"{array.dtype} {list(array.shape)}")
    return tuple(map(tuple, np.atleast_2d(array).tolist()))


def _read_safetensors(path: Path) -> TokenLists:
    found = {entry.name: entry for entry in read_header(path)}
    entry = found.get(TOKEN_IDS)
    if entry is None:
        raise _refusal(path, f"a tensor {TOKEN_IDS}", ", ".join(list(found)[:5]) or "none")
    if entry.dtype not in ("I64", "I32", "I16", "U8") or len(entry.shape) not in (1, 2) or not entry.nbytes:
        raise _refusal(path, f"{TOKEN_IDS} of integers, (T,) or (N, T)", f"{entry.dtype} {list(entry.shape)}")
    ids: torch.Tensor = _read_tensor(path, entry.begin, entry.nbytes).view(torch_dtype(entry.dtype)).view(entry.shape)
    return tuple(map(tuple, (ids if ids.ndim == 2 else ids[None]).tolist()))


def _read_tensor(path: Path, begin: int, nbytes: int) -> "torch.Tensor":
    import os

    import torch

    data = torch.empty(nbytes, dtype=torch.uint8)
    descriptor = open_file(path)
    try:
        read_exactly(descriptor, data.numpy().data, begin, path)
    finally:
        os.close(descriptor)
    return data


def _refusal(path: Path, expected: str, found: str) -> UsageError:
    return UsageError(f"{TOKENS_OPTION} {path}", expected=expected, found=found)
