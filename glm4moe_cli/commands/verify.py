"""`glm4moe verify`: compare a checkpoint with the one it was made from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from glm4moe_cli._options import PathName, checkpoint_argument, output_options
from glm4moe_cli._output import Output
from glm4moe_cli.commands import _models as models
from glm4moe_cli.commands._levels import (
    BYTES,
    CHOICES,
    LAYERS,
    LOGITS,
    RUNTIME,
    STRUCTURE,
    TEXT,
    WEIGHTS,
    Resources,
    check_bytes,
    check_options,
    check_saving_options,
    check_weights,
    chosen_levels,
)
from glm4moe_cli.commands._model_plan import plan_run
from glm4moe_cli.commands._verification import (
    compared,
    decoder,
    diagnosed,
    is_sound,
    provenance,
    raise_failure,
    scheme_of,
    show,
)
from glm4moe_cli.commands._verify_options import (
    limit_options,
    reference_options,
    report_option,
    run_options,
    token_options,
)
from runtime.verify.report import Levels, VerifyReport, build_report

EXAMPLE = """\b
Examples:
  glm4moe verify GLM-4.5-Air-NVFP4 --against GLM-4.5-Air --report GLM-4.5-Air-NVFP4.html
  glm4moe verify GLM-4.5-Air-FP8 --against GLM-4.5-Air --text sample.txt
  glm4moe verify GLM-4.5-Air --save-reference air.safetensors --text sample.txt
  glm4moe verify GLM-4.5-Air-FP8 --reference air.safetensors
"""


@click.command(epilog=EXAMPLE)
@checkpoint_argument
@click.option(
    "--against",
    "source",
    type=PathName(exists=True, file_okay=False),
    metavar="SRC",
    help="The checkpoint that CKPT was made from; needed but with --reference or to --save-reference.",
)
@click.option(
    "--level",
    type=click.Choice(CHOICES),
    show_default="standard; with --text or --tokens full",
    help="structure: names, shapes, dtypes, config and files, from headers alone. bytes: digests of CKPT's files. "
    "weights: every element within half a step of its source, or equal. layers: each layer and router, the embedding, "
    "norms and the head, on the source's own input. logits: both models run freely. text: answers to a few prompts. "
    "runtime: an engine that serves CKPT. quick: the first two; standard: the first three; full: up to logits; "
    "release: every one; all: every one, runtime where --engine-logprobs is given.",
)
@token_options
@reference_options
@limit_options
@report_option
@run_options
@output_options
def command(output: Output, checkpoint: Path, source: Path | None, strict: bool, **options: Any) -> None:
    """Prove that CKPT is as good as SRC, the checkpoint it was made from.

    Without --text or --tokens, levels that run models use a small built-in corpus: good for a first look.

    Exit code 0: it passed, maybe with warnings; 3: it did not.
    """
    ctx = click.get_current_context()
    chosen = chosen_levels(ctx.params)
    if not chosen and options["save_reference"] is not None:
        check_saving_options(ctx)
        _save_only(output, checkpoint, options)
        return
    check_options(ctx, chosen)
    report = _Verification(output, source, checkpoint, chosen, options).run()
    show(output, report)
    if options["report"] is not None:
        _write(output, options["report"], report, source or checkpoint)
    raise_failure(report, strict=strict)


class _Verification:
    """One run: the levels in their order, as far as what was found lets them make sense."""

    def __init__(
        self, output: Output, source: Path | None, candidate: Path, chosen: tuple[str, ...], options: dict[str, Any]
    ) -> None:
        self.output, self.source, self.candidate, self.options = output, source, candidate, options
        self.folders = source or options["reference"] or candidate, candidate
        self.chosen = chosen
        self.plan: dict[str, Any] = {}
        self.structure = None if source is None else compared(output, source, candidate)
        self.scheme = scheme_of(candidate) if self.structure is None else self.structure.scheme

    def run(self) -> VerifyReport:
        """Run the levels and judge them."""
        if self.options["report"] is not None:
            from runtime.verify.report_files import check_report_path

            check_report_path(self.options["report"])
        levels = Levels(structure=self.structure if STRUCTURE in self.chosen else None)
        further = tuple(name for name in self.chosen if name != STRUCTURE)
        if further and self._is_unsound():
            levels = Levels(structure=self.structure)
            self.output.warning(f"The structure is wrong; {', '.join(further)} were not compared.")
            further = ()
        runs = self._plan(further)
        levels = self._files(levels, further)
        if runs is not None:
            levels = self._models(levels, further, runs)
        if TEXT in further:
            assert self.source is not None
            answers = models.check_answers((self.source, self.candidate), self.scheme, self.options["device"])
            levels = replace(levels, text=answers)
        limits = models.model_limits(self.scheme, self.options, runs.how) if runs is not None else None
        facts = provenance((self.source, self.candidate), self.options) | {"plan": self.plan}
        report = build_report(self.folders, self.scheme, levels, limits, facts)
        return report if self.source is None else diagnosed(self.output, report)

    def _is_unsound(self) -> bool:
        if self.source is None or self.structure is None or not {STRUCTURE, WEIGHTS, LAYERS} & set(self.chosen):
            return False
        return not is_sound((self.source, self.candidate), self.structure)

    def _plan(self, further: tuple[str, ...]) -> models.ModelRuns | None:
        """Read the tokens and plan the memory before anything long is begun."""
        if TEXT in further and self.source is not None:
            models.check_room((self.source, self.candidate), self.options["device"])
        if not {LAYERS, LOGITS, RUNTIME} & set(further):
            return None
        runs = models.plan_models(self.source or self.candidate, self.options, further)
        self.plan = plan_run(self.output, runs, self.source, self.candidate, self.options)
        return runs

    def _files(self, levels: Levels, further: tuple[str, ...]) -> Levels:
        resources = Resources(self.options["workers"], self.options["max_memory"])
        if BYTES in further:
            asked = self.options["level"] == BYTES
            levels = replace(levels, contents=check_bytes(self.output, self.candidate, resources, is_asked_for=asked))
        if WEIGHTS in further:
            assert self.source is not None
            weights = check_weights(self.output, (self.source, self.candidate), resources)
            levels = replace(levels, weights=weights)
        return levels

    def _models(self, levels: Levels, further: tuple[str, ...], runs: models.ModelRuns) -> Levels:
        if self.options["save_reference"] is not None:
            models.save(self.output, self.source or self.candidate, runs, self.options)
        reference = self.options["reference"]
        if reference is not None and runs.compares:
            found = models.compare_with_reference(self.output, reference, self.candidate, runs, self.source)
            levels = replace(levels, layers=found.models, routing=found.routing)
        elif runs.compares:
            assert self.source is not None
            compared_models = models.compare_models(self.output, (self.source, self.candidate), runs)
            levels = replace(levels, layers=compared_models)
        if levels.layers is not None:
            for note in levels.layers.notes:
                self.output.warning(note)
        if RUNTIME in further:
            where = self.options["engine_logprobs"]
            levels = replace(levels, runtime=models.compare_with_engine(self.output, self.candidate, runs, where))
        return levels


def _save_only(output: Output, checkpoint: Path, options: dict[str, Any]) -> None:
    runs = models.plan_models(checkpoint, options, ())
    plan_run(output, runs, None, checkpoint, options)
    facts = models.save(output, checkpoint, runs, options)
    output.facts("Reference", {"file": options["save_reference"], "tokens": runs.text.plan.protocol})
    output.result({"reference": options["save_reference"], "facts": facts})


def _write(output: Output, path: Path, report: VerifyReport, tokenizer: Path) -> None:
    from runtime.verify.report_files import write_reports

    files = write_reports(path, report, decode=decoder(tokenizer))
    output.hint(f"Report: {', '.join(map(str, files))}")
