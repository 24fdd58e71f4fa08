"""The options that say how a checkpoint is cut for ranks, shared by the commands that take them."""

import functools
from collections.abc import Callable
from typing import Any

import click

from converters.errors import UsageError
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts


def mapping_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --tp, --ep, --pp and the choices that go with them; pass them as `mapping`, None if no size is given."""

    @functools.wraps(function)
    def command(
        *args: Any,
        tp: int | None,
        ep: int | None,
        pp: int | None,
        expert_placement: str,
        redundant_experts: int,
        shared_experts: str,
        **options: Any,
    ) -> Any:
        mapping = None
        choices = {
            "--expert-placement": (expert_placement, Placement.CONTIGUOUS),
            "--shared-experts": (shared_experts, SharedExperts.SPLIT),
        }
        for name, (value, default) in choices.items():
            if value != default and not (tp or ep or pp):
                raise UsageError(f"{name} {value}", expected="--tp, --ep or --pp beside it", found="none of them")
        if tp or ep or pp or redundant_experts:
            mapping = ParallelMapping(
                tp=tp or 1,
                ep=ep or 1,
                pp=pp or 1,
                placement=Placement(expert_placement),
                redundant_experts=redundant_experts,
                shared_experts=SharedExperts(shared_experts),
            )
        return function(*args, mapping=mapping, **options)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_size = click.IntRange(min=1, max=1 << 12)
_OPTIONS = (
    click.option("--tp", type=_size, metavar="T", help="Ranks that every layer is cut over."),
    click.option("--ep", type=_size, metavar="E", help="Ranks that the routed experts are dealt to; E divides T."),
    click.option("--pp", type=_size, metavar="P", help="Pipeline stages, balanced by bytes."),
    click.option(
        "--expert-placement",
        type=click.Choice([choice.value for choice in Placement]),
        default=Placement.CONTIGUOUS.value,
        show_default=True,
        help="How experts are dealt to the ranks of --ep.",
    ),
    click.option(
        "--redundant-experts",
        type=click.IntRange(min=0, max=1 << 12),
        metavar="N",
        default=0,
        show_default=True,
        help="Slots beyond the routed experts, filled with copies, over all ranks of --ep.",
    ),
    click.option(
        "--shared-experts",
        type=click.Choice([choice.value for choice in SharedExperts]),
        default=SharedExperts.SPLIT.value,
        show_default=True,
        help="Each rank has its slice of the shared expert, or all of it.",
    ),
)
