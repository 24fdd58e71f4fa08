"""The texts that come with the package: a first look at two models, where the user gives no text of his own.

Five kinds, a few kilobytes each: English prose, code, mathematics, Chinese, and a dialogue. They contain no special
tokens, so every tokenizer takes them. A figure of merit for a real task needs a text of that task.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from runtime.verify.tokens import EncodedText, WindowSizes, encode_texts

_FOLDER = "data"
KINDS = ("prose", "code", "mathematics", "chinese", "dialogue")
# part of what a figure means: raise it with every change of a text
CORPUS_VERSION = 1


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts by kind, in the order of KINDS."""

    texts: dict[str, str]

    @property
    def origin(self) -> str:
        """Return what the texts are, for a protocol."""
        return f"built-in corpus {CORPUS_VERSION}: {', '.join(self.texts)}"


def default_corpus() -> Corpus:
    """Read the texts that come with the package."""
    folder = files("runtime.verify") / _FOLDER
    return Corpus({kind: (folder / f"{kind}.txt").read_bytes().decode() for kind in KINDS})


def encode_corpus(source: Path, options: WindowSizes) -> EncodedText:
    """Encode the built-in corpus with a checkpoint's tokenizer; see `encode_text` for what is raised.

    Where options.num_tokens asks for fewer tokens than there are, each kind gives a window in turn.
    """
    corpus = default_corpus()
    return encode_texts(source, list(corpus.texts.values()), options, origin=corpus.origin)
