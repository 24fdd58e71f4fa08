"""One of two checkpoints that are compared: its headers and config, whatever is wrong with them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.header import TensorEntry
from converters.checkpoint.index import scan_checkpoint
from converters.config import CONFIG_FILE, Glm4MoeConfig, read_json
from converters.errors import InputError
from converters.findings import Finding, fail, warn
from converters.formats import modelopt
from converters.layout import Place, Stored, StoredLayout, is_cache_scale, most_common_layout, parse_known
from converters.result_config import layout_block
from converters.schema import ModelSchema, Role, Tensor, schema_for_parsed
from converters.shard.source import is_sharded, open_sharded
from converters.shard.whole import merged_entries
from converters.source import LAYOUT_KEY, announced_layout, is_stored_as
from converters.stored_form import Declaration, StoredForm, parse_quantization, plain_form

_EMBEDDINGS = frozenset({Role.EMBEDDING, Role.MTP_EMBEDDING})


@dataclass(frozen=True, slots=True)
class Held:
    """How a checkpoint holds an official tensor.

    Attributes:
        dtype: of the values or codes.
        scheme: what the codes are; None for values.
        places: where they are.
    """

    dtype: str
    scheme: str | None
    places: tuple[Place, ...]

    @property
    def where(self) -> tuple[tuple[str, int, int], ...]:
        """Tensor, element and first row of each piece."""
        return tuple((place.stored.name, place.element, place.row) for place in self.places)

    @property
    def is_plain(self) -> bool:
        """Whether the values themselves are stored."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint in the layout that most of its names show, with the schema that fits them.

    Attributes:
        parts: what is on disk of each stored tensor, by suffix.
        foreign: names that neither layout nor config ask for, with the reason.
        cache_scales: scales of the KV cache by name, with the weight that each hangs on.
    """

    label: str
    raw_config: dict[str, Any]
    config: Glm4MoeConfig
    notes: tuple[str, ...]
    layout: StoredLayout
    parts: dict[str, dict[str, TensorEntry]]
    foreign: dict[str, str]
    cache_scales: dict[str, str]
    declared: Declaration | None
    _forms: dict[str, StoredForm] = field(default_factory=dict)

    @classmethod
    def open(cls, label: str, folder: Path) -> "Side":
        """Read headers and config.

        Raises:
            InputError, ConfigError: they cannot be read, or the model or its quantization is not supported.
        """
        raw, entries, index_notes = _read_headers(folder)
        config = Glm4MoeConfig.from_hf(raw)
        known = parse_known(entries, config)
        layout = most_common_layout(known)
        schema = schema_for_parsed(config, [parsed for parsed, layouts in known.values() if layout in layouts])
        declared = parse_quantization(raw, folder)
        side = cls(label, raw, config, index_notes, StoredLayout(schema, layout), {}, {}, {}, declared)
        for name, entry in entries.items():
            side._add(entry, is_known=name in known)
        return side

    def _add(self, entry: TensorEntry, *, is_known: bool) -> None:
        try:
            if is_known and is_cache_scale(entry.name) and self.declared is not None:
                self.cache_scales[entry.name] = self.schema.locate(entry.name).name
            else:
                stored, suffix = self.layout.resolve(entry.name)
                self.parts.setdefault(stored.name, {})[suffix] = entry
        except InputError:
            reason = "a tensor its config does not ask for" if is_known else "a name that is not in the table"
            self.foreign[entry.name] = reason

    @property
    def is_modelopt(self) -> bool:
        """Whether its quantization is described in ModelOpt's words."""
        return self.declared is not None and self.declared.method.startswith(modelopt.QUANT_METHOD)

    @property
    def schema(self) -> ModelSchema:
        """The official tensors that the checkpoint should hold."""
        return self.layout.schema

    def form(self, stored: Stored) -> StoredForm:
        """Return how a tensor must be stored here; to be asked when all names are taken in."""
        if stored.name not in self._forms:
            entries = self.parts.get(stored.name, {})
            self._forms[stored.name] = self.declared.form(stored, entries) if self.declared else plain_form(stored)
        return self._forms[stored.name]

    def held(self, tensor: Tensor) -> Held | None:
        """Return how an official tensor is held; None if it, or a piece of it, is not there."""
        if tensor.name not in self.schema.tensors:
            return None
        places = self.layout.places(tensor)
        found = []
        for place in places:
            form, entries = self.form(place.stored), self.parts.get(place.stored.name, {})
            found.append((entries.get(form.codes) or entries.get(""), form.scheme))
        if any(entry is None for entry, _ in found):
            return None
        entry, scheme = found[0]
        assert entry is not None, tensor
        return Held(entry.dtype, None if entry.dtype in FLOAT_DTYPES else scheme, places)

    def subject(self, name: str) -> str:
        """Return how a finding names a tensor."""
        return f"{self.label}: tensor {name}"

    def findings(self) -> Iterator[Finding]:
        """Hold the checkpoint against its own config."""
        for note in self.notes:
            yield warn(f"{self.label}: index", "every file that belongs to the checkpoint", note)
        yield from self._layout_findings()
        yield from (fail(self.subject(name), "no such tensor", found) for name, found in self._additional())
        for stored in self.layout.stored.values():
            yield from self._stored_findings(stored)

    def _additional(self) -> list[tuple[str, str]]:
        names = dict(self.foreign)
        for stored in self.layout.stored.values():
            known = {part.suffix for part in self.form(stored).parts}
            additional = self.parts.get(stored.name, {}).keys() - known
            names |= {stored.part(suffix): "a tensor its config does not ask for" for suffix in additional}
        return sorted(names.items())

    def _stored_findings(self, stored: Stored) -> Iterator[Finding]:
        form, entries = self.form(stored), self.parts.get(stored.name, {})
        for part in form.parts:
            entry, subject = entries.get(part.suffix), self.subject(stored.part(part.suffix))
            if entry is None and not part.is_optional:
                yield fail(subject, part.expected, "nothing")
            elif entry is not None and not part.accepts(entry):
                yield fail(subject, part.expected, f"{entry.dtype} {list(entry.shape)}")
        rule, role = self.declared and self.declared.rule, stored.elements[0][0].tensor.spec.role
        if form.scheme is None and rule and rule.covers_stored(stored) and role not in _EMBEDDINGS:
            subject = f"{self.label}: quantization_config.ignore"
            yield warn(subject, f"{stored.module}, which is not quantized", "no such entry")

    def _layout_findings(self) -> Iterator[Finding]:
        """Check what config.json says about the layout, if it says anything: names show it without."""
        name, subject = announced_layout(self.raw_config), f"{self.label}: {CONFIG_FILE}: {LAYOUT_KEY}"
        if name is None:
            return
        expected = layout_block(self.layout.layout, self.config)
        if not is_stored_as(self.layout, name):
            yield fail(subject, f"{self.layout.layout}, as the tensors' names show", repr(name))
        elif isinstance(self.raw_config[LAYOUT_KEY], dict) and name == self.layout.layout:
            for key, value in expected.items():
                found = self.raw_config[LAYOUT_KEY].get(key)
                if found != value:
                    yield fail(f"{subject}.{key}", repr(value), "nothing" if found is None else repr(found)[:200])


def _read_headers(folder: Path) -> tuple[dict[str, Any], dict[str, TensorEntry], tuple[str, ...]]:
    """Return config, tensors by name and notes of a checkpoint; one that is cut for ranks as it would be uncut."""
    if is_sharded(folder):
        with open_sharded(folder) as sharded:
            return sharded.raw_config, merged_entries(sharded), ()
    raw = read_json(folder / CONFIG_FILE)
    # a config that is not supported explains more than files that do not fit it
    Glm4MoeConfig.from_hf(raw)
    index = scan_checkpoint(folder)
    return raw, {name: entry for name, (_, entry) in index.entries.items()}, index.notes
