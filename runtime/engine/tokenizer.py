"""Text to token ids and back, and which ids end an answer.

tokenizer.json holds all that GLM-4's tokenizer is, so the `tokenizers` library reads it alone: no code of the
checkpoint is involved, and the seconds that importing transformers takes are saved. That both agree is tested.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.config import Glm4MoeConfig, read_json
from converters.errors import InputError, UsageError
from runtime.engine.template import Message, read_template, render_chat

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILE = "tokenizer.json"
GENERATION_CONFIG_FILE = "generation_config.json"
_MAX_TOKENIZER_BYTES = 256 << 20


class Tokenizer:
    """Byte-level BPE of one checkpoint folder."""

    def __init__(self, backend: "Backend", folder: Path) -> None:
        added = backend.get_added_tokens_decoder()
        self.folder = folder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._backend = backend
        self._byte_of = _byte_alphabet()

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json.

        Raises:
            InputError: there is none, it is malformed, or its tokens are not byte-level.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers.decoders import ByteLevel

        path = folder / TOKENIZER_FILE
        if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER_BYTES:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "none"
            raise InputError(str(path), expected="a tokenizer file of at most 256 MiB", found=found)
        try:
            backend = Backend.from_buffer(path.read_bytes())
        except ValueError as error:
            raise InputError(str(path), expected="a tokenizer", found=str(error)) from error
        if not isinstance(backend.decoder, ByteLevel):
            raise InputError(str(path), expected="a byte-level tokenizer", found=type(backend.decoder).__name__)
        return cls(backend, folder)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; nothing is put in front, and the names of special tokens become those tokens.

        Raises:
            UsageError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError("prompt", expected="valid UTF-8", found=error.reason) from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_chat(
        self, messages: Sequence[Message], *, enable_thinking: bool = True, tools: Sequence[Message] | None = None
    ) -> list[int]:
        """Return the ids of the prompt for the assistant's next turn, as the folder's chat template writes it.

        Raises:
            InputError: the folder has no chat template.
            SecurityError: the template failed or went over its limits.
        """
        template = read_template(self.folder)
        return self.encode(render_chat(template, messages, enable_thinking=enable_thinking, tools=tools))

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of a whole output; an unfinished character at its end is left out."""
        stream = TextStream(self, skip_special=skip_special)
        return "".join(stream.push(token_id) for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for, as UTF-8 bytes or a part of such; nothing for an id that is only padding."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        # added tokens are stored as text; one with a character outside the alphabet cannot be meant byte by byte
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()


class TextStream:
    """Turns tokens into text as they come. Bytes of an unfinished character wait for the rest of it.

    Args:
        tokenizer: of the model.
        skip_special: leave out special tokens such as the end tokens; think and tool tags are not special.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token; bytes that can never become text turn into U+FFFD."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


def read_end_token_ids(folder: Path) -> frozenset[int]:
    """Return every id that ends an answer: those of config.json and those of generation_config.json.

    Raises:
        InputError: generation_config.json holds something else than ids.
    """
    from_config = Glm4MoeConfig.from_folder(folder).eos_token_id
    path = folder / GENERATION_CONFIG_FILE
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(item) is not int or item < 0 for item in ids):
        raise InputError(f"{path}: eos_token_id", expected="token ids", found=repr(value))
    return frozenset(from_config) | frozenset(ids)


def _byte_alphabet() -> dict[str, int]:
    """Return the character that stands for each byte in byte-level BPE: itself if printable, else one from U+0100 on.

    Source: GPT-2's bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
