"""README.md of a quantized source, carried along by a conversion that its serving commands do not survive.

Engines load the official layout, uncut. Where a result of ours has another one, its card says so above the commands,
and what leads back; the conversion back takes that out again, so that a round trip leaves the card as it was. A card
that is not ours names a repository on the hub, where its commands stay true: it is copied.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.checkpoint.disk_read import read_file
from converters.checkpoint.journal import TensorRecord
from converters.conversion import passthrough_files
from converters.layout import Layout
from converters.model_card import CARD_FILE, QUANTIZED_BY, SERVING
from converters.source import Source

_OURS = re.compile(rf"---\n(?:.*\n)*?quantized_by: {QUANTIZED_BY}\n(?:.*\n)*?---\n")
_NOTE = re.compile(r"\*\*Not as it is: [^\n]*\*\*\n\n")
_SPECULATIVE = re.compile(r" \\\n  --speculative-[^\n]*")
_NO_MTP = "The MTP layer that this card lists is not here."
_HEADING = f"{SERVING}\n\n"


@dataclass(frozen=True, slots=True)
class CarriedCard:
    """The card of a result; called when all is written, for a source that is fetched has its files only then.

    Args:
        path: of the source's.
        layout: of the result.
        is_cut: the result is cut for ranks.
        drops_mtp: the result lost the MTP layer.
    """

    path: Path
    layout: Layout
    is_cut: bool = False
    drops_mtp: bool = False

    def __call__(self, _: Mapping[str, TensorRecord]) -> bytes:
        """Return README.md."""
        data = read_file(self.path)
        text = data.decode(errors="surrogateescape")
        if not _OURS.match(text) or _HEADING not in text:
            return data
        text = _NOTE.sub("", text)
        if self.drops_mtp:
            text = _SPECULATIVE.sub("", text).replace(_HEADING, f"{_HEADING}{_NO_MTP}\n\n", 1)
        return text.replace(_HEADING, _HEADING + self._note(), 1).encode(errors="surrogateescape")

    def _note(self) -> str:
        """Return what is above the commands; nothing where they hold."""
        if self.is_cut:
            return _said("cut for ranks", "glm4moe shard . DST --merge")
        if self.layout is not Layout.SPLIT:
            return _said(f"in the `{self.layout}` layout", "glm4moe convert . DST --layout split")
        return ""


def _said(how: str, command: str) -> str:
    return f"**Not as it is: the weights here are {how}. First `{command}`.**\n\n"


def carried_card(
    source: Source, layout: Layout, *, is_cut: bool = False, drops_mtp: bool = False
) -> dict[str, CarriedCard]:
    """Return the card of a result by its name; nothing if the source has none."""
    if CARD_FILE not in passthrough_files(source.folder):
        return {}
    return {CARD_FILE: CarriedCard(source.folder / CARD_FILE, layout, is_cut, drops_mtp)}
