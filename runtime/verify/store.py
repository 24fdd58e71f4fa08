"""A reference that outlives its model: what the source made of a text, kept so that candidates need no source.

Shape suffixes: R rows, one for every token of every window, window after window; S scored tokens; D hidden, V
vocabulary, K experts per token.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import converters
from converters.checkpoint.manifest import source_digest
from converters.errors import InputError
from converters.shard.whole import open_whole
from converters.source import Source
from runtime.config import EngineConfig
from runtime.model.linear import Linear
from runtime.model.loader import ModelLoader
from runtime.streaming.plan import LOGIT_ROWS
from runtime.verify import store_layout as layout
from runtime.verify.head import fits_bf16, head_digest, head_names, load_head
from runtime.verify.store_file import RowReader, RowWriter
from runtime.verify.store_layers import KeptLayers, keep_parts, kept_layers, layer_specs, write_gains
from runtime.verify.store_layout import CONFIG_FIELDS, METRIC_VERSION, ModelRun, ReferenceFacts, Runner, RunOptions
from runtime.verify.tokens import TOKEN_IDS, EncodedText
from runtime.verify.windows import Window, WindowPlan

# rows of hidden states or of the head that are copied at a time
_COPY_ROWS = 4096
_MAX_ABOUT_BYTES = 1 << 20
_PLAN_FIELDS = ("num_text_tokens", "num_tokens", "context_length", "stride", "num_texts", "seed", "origin")


class StoredReference:
    """An open reference file; a context manager. Memory: what a call returns.

    Attributes:
        facts: what it was made of.
        text: the tokens and windows.
    Raises:
        InputError: it is no reference, a damaged one, or one of another version of the figures.
    """

    def __init__(self, reader: RowReader) -> None:
        self._reader = reader
        self.path = reader.path
        self.facts = _read_facts(reader)
        self.text = _read_text(reader, self.facts)
        found = reader.entries[layout.HIDDEN].shape if layout.HIDDEN in reader.entries else None
        expected = (layout.row_starts(self.text.plan)[-1], self.facts.hidden_size)
        if found != expected or layout.tokens_digest(self.text) != self.facts.tokens_digest:
            raise _damaged(self.path, f"hidden states {list(expected)} of its own tokens", str(found))

    @classmethod
    def open(cls, path: Path) -> "StoredReference":
        """Open a file that `save_reference` wrote; only headers, facts and tokens are read."""
        with ExitStack() as stack:
            opened = cls(stack.enter_context(RowReader(path)))
            stack.pop_all()
        return opened

    def __enter__(self) -> "StoredReference":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._reader.close()

    def hidden(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the final hidden states, (rows, D) fp32."""
        return self._reader.read(layout.HIDDEN, start, stop)

    def nll(self) -> torch.Tensor:
        """Return the losses (S,) fp64 in nats."""
        return self._reader.read(layout.NLL)

    def log_z(self) -> torch.Tensor:
        """Return the logarithm of the sum over the vocabulary of e^logit, (S,) fp64."""
        return self._reader.read(layout.LOG_Z)

    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most likely tokens: ids (S, N) int32 and log-probabilities (S, N) fp32, most likely first."""
        return self._reader.read(layout.TOP_IDS), self._reader.read(layout.TOP_LOGPROBS)

    def routing_ids(self) -> dict[int, torch.Tensor]:
        """Return the experts (R, K) int64 of every MoE layer."""
        layers = range(self.facts.first_k_dense_replace, self.facts.num_hidden_layers)
        return {layer: self._reader.read(layout.routing_name(layer)).to(torch.int64) for layer in layers}

    def norms(self, layer: int) -> torch.Tensor:
        """Return the L2 norms (R,) fp32 of the hidden states behind a layer."""
        return self._reader.read(layout.norm_name(layer))

    def layers(self, engine: EngineConfig) -> KeptLayers:
        """Return what it keeps of the layers.

        Raises:
            UsageError: it was saved without them. InputError: a part of them is missing or misshapen.
        """
        return kept_layers(self._reader, self.facts, layout.row_starts(self.text.plan)[-1], engine)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head that was kept; 0 where none was."""
        entry = self._reader.entries.get(layout.HEAD)
        return 0 if entry is None else entry.nbytes

    def head(self) -> Linear | None:
        """Return the head that was kept, on the CPU, or None.

        Raises:
            InputError: it is not the head that the hidden states were made for.
        """
        if layout.HEAD not in self._reader.entries:
            return None
        head = Linear(self.facts.hidden_size, self.facts.vocab_size)
        head.weight = torch.nn.Parameter(self._reader.read(layout.HEAD), requires_grad=False)
        if head_digest(head) != self.facts.head_digest:
            raise _damaged(self.path, "the head of its own digest", "another")
        return head


def save_reference(
    path: Path,
    source: Path,
    text: EncodedText,
    options: RunOptions,
    runner: Runner,
    *,
    with_head: bool = False,
    with_inputs: bool = False,
) -> ReferenceFacts:
    """Run a model on a text and keep what it made of it.

    Args:
        path: the file; it appears when it is complete.
        source: checkpoint folder.
        text: to run.
        options: how.
        runner: what runs it.
        with_head: keep the head as well (1.5 GB at full size), for candidates whose own head is quantized.
        with_inputs: keep what every layer was given and made of it: 40 KiB a token and layer at full size.
    Raises:
        InputError: the checkpoint cannot be run. ResourceError: no room for the file; found before the run.
    """
    with open_whole(source) as opened:
        loader = ModelLoader(opened, EngineConfig(dtype=options.dtype, device=options.device), with_mtp=False)
        head = load_head(loader)
        facts = _facts(opened, head, text, options)
        about = json.dumps({"schema": layout.SCHEMA, **asdict(facts)}, sort_keys=True).encode()
        head_dtype = ("BF16" if fits_bf16(head) else "F32") if with_head else None
        specs = layout.tensor_specs(opened.config, text, len(about), head_dtype=head_dtype)
        if with_inputs:
            specs += layer_specs(opened.config, layout.row_starts(text.plan)[-1])
        with RowWriter(path, specs) as writer:
            writer.write(layout.ABOUT, torch.frombuffer(bytearray(about), dtype=torch.uint8))
            writer.write(TOKEN_IDS, torch.tensor(text.token_ids))
            writer.write(layout.WINDOWS, layout.windows_tensor(text.plan))
            if with_head:
                _write_head(writer, head)
            if with_inputs:
                write_gains(writer, loader)
            # none is held while layers are
            loader.release(head_names(loader))
            on_part = keep_parts(writer) if with_inputs else None
            run = runner(source, text, options, on_part, behind=saving_bytes(facts.vocab_size))
            _write_run(writer, run, load_head(loader), text, facts)
            writer.finish()
    return facts


def saving_bytes(vocab_size: int) -> int:
    """Return the most bytes that `save_reference` holds beside the head and a block of logits.

    These are the block in fp64 and, for the logarithm of its sum, its exponentials.
    """
    return 2 * LOGIT_ROWS * vocab_size * torch.float64.itemsize


def _facts(opened: Source, head: Linear, text: EncodedText, options: RunOptions) -> ReferenceFacts:
    return ReferenceFacts(
        metric_version=METRIC_VERSION,
        version=converters.__version__,
        torch=str(torch.__version__),
        source_digest=source_digest(opened.reader, opened.raw_config),
        head_digest=head_digest(head),
        tokens_digest=layout.tokens_digest(text),
        **{name: getattr(opened.config, name) for name in CONFIG_FIELDS},
        dtype=options.dtype,
        device=options.device,
        activations=options.activations,
        plan={name: getattr(text.plan, name) for name in _PLAN_FIELDS},
    )


def _write_head(writer: RowWriter, head: Linear) -> None:
    for start in range(0, head.weight.shape[0], _COPY_ROWS):
        writer.write(layout.HEAD, head.dequantized(torch.float32, start, start + _COPY_ROWS), start)


@torch.inference_mode()
def _write_run(writer: RowWriter, run: ModelRun, head: Linear, text: EncodedText, facts: ReferenceFacts) -> None:
    for start in range(0, len(run.final_hidden_RD), _COPY_ROWS):
        writer.write(layout.HIDDEN, run.final_hidden_RD[start : start + _COPY_ROWS], start)
    for layer, ids_RK in run.routing_ids.items():
        if layout.routing_name(layer) in writer.names:
            writer.write(layout.routing_name(layer), ids_RK)
    for layer in range(facts.num_hidden_layers):
        unknown = torch.full((len(run.final_hidden_RD),), torch.nan)
        writer.write(layout.norm_name(layer), run.norms.get(layer, unknown))
    done, starts, device = 0, layout.row_starts(text.plan), head.weight.device
    for window in text.plan.windows:
        hidden_SD = run.final_hidden_RD[starts[window.index] : starts[window.index + 1]][window.logit_rows]
        next_S = torch.tensor(text.token_ids[window.first_scored : window.end], device=device)
        for hidden_rows, next_rows in zip(hidden_SD.split(LOGIT_ROWS), next_S.split(LOGIT_ROWS), strict=True):
            logits_SV = head.forward_fp32(hidden_rows.to(device))
            log_z_S = logits_SV.double().logsumexp(-1)
            top = logits_SV.topk(min(layout.TOP_N, logits_SV.shape[1]))
            writer.write(layout.LOG_Z, log_z_S, done)
            writer.write(layout.NLL, log_z_S - logits_SV.gather(1, next_rows[:, None])[:, 0].double(), done)
            writer.write(layout.TOP_IDS, top.indices, done)
            writer.write(layout.TOP_LOGPROBS, top.values.double() - log_z_S[:, None], done)
            done += len(next_rows)


def _read_facts(reader: RowReader) -> ReferenceFacts:
    entry = reader.entries.get(layout.ABOUT)
    if entry is None or entry.dtype != "U8" or len(entry.shape) != 1 or entry.nbytes > _MAX_ABOUT_BYTES:
        raise _damaged(reader.path, f"a reference of the form {layout.SCHEMA}", "another safetensors file")
    try:
        found: Any = json.loads(bytes(reader.read(layout.ABOUT).numpy().data))
    except ValueError as error:
        raise _damaged(reader.path, "facts as JSON", str(error)) from error
    if not isinstance(found, dict) or found.pop("schema", None) != layout.SCHEMA:
        raise _damaged(reader.path, f"a reference of the form {layout.SCHEMA}", "another form")
    if found.get("metric_version") != METRIC_VERSION:
        raise InputError(
            str(reader.path),
            expected=f"figures of version {METRIC_VERSION}",
            found=str(found.get("metric_version")),
            next_step="Save the reference again with this version.",
        )
    kinds = {field.name: field.type if field.type in (int, str) else dict for field in fields(ReferenceFacts)}
    wrong = next((name for name, kind in kinds.items() if type(found.get(name)) is not kind), None)
    if wrong is not None or found.keys() != kinds.keys():
        raise _damaged(reader.path, "all facts of a reference", f"{wrong or 'others'}")
    return ReferenceFacts(**found)


def _read_text(reader: RowReader, facts: ReferenceFacts) -> EncodedText:
    ids, windows = reader.read(TOKEN_IDS), reader.read(layout.WINDOWS)
    rows: list[list[int]] = windows.tolist() if windows.ndim == 2 and windows.shape[1] == 3 else []
    sound = all(0 <= begin < first < end <= len(ids) for begin, first, end in rows)
    if not rows or not sound or set(facts.plan) != set(_PLAN_FIELDS) or int(ids.max()) >= facts.vocab_size:
        raise _damaged(reader.path, "windows of its tokens", "others")
    cut = tuple(Window(index, *row) for index, row in enumerate(rows))
    return EncodedText(tuple(ids.tolist()), WindowPlan(**facts.plan, windows=cut))


def _damaged(path: Path, expected: str, found: str) -> InputError:
    return InputError(str(path), expected=expected, found=found, next_step="Save the reference again.")
