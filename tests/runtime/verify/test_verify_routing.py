"""Routing agreement per layer against a case counted by hand."""

import pytest
import torch

from runtime.verify.routing import LayerRouting, RoutingCounter


def test_overlap_and_changed_sets_are_counted_per_layer_over_windows() -> None:
    counter = RoutingCounter()
    counter.add({3: torch.tensor([[0, 1], [2, 3]])}, {3: torch.tensor([[1, 0], [2, 4]])})
    counter.add({3: torch.tensor([[5, 6]])}, {3: torch.tensor([[0, 1]])})
    # overlaps 1, 1/2, 0 over three tokens; the order within a set does not count as a change
    assert counter.result() == (LayerRouting(3, 3, pytest.approx(0.5), pytest.approx(2 / 3)),)


def test_layers_come_in_order_and_apart() -> None:
    counter = RoutingCounter()
    same, other = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    counter.add({10: same, 2: same}, {10: other, 2: same})
    assert [(row.layer, row.overlap, row.changed) for row in counter.result()] == [(2, 1.0, 0.0), (10, 0.0, 1.0)]


def test_different_layers_on_both_sides_are_our_bug() -> None:
    with pytest.raises(AssertionError):
        RoutingCounter().add({1: torch.tensor([[0]])}, {2: torch.tensor([[0]])})


def test_model_without_moe_layers_has_no_rows() -> None:
    assert RoutingCounter().result() == ()
