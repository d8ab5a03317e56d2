"""Conformance: every entry of METHODS keeps the promises that the engine, the sweeps and the README rely on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from hamu import combine_gradients
from hamu.errors import ConfigError
from hamu.methods.base import Method, MethodSettings
from hamu.methods.catalog import METHODS, find_method
from hamu.methods.names import HAMU_METHODS, METHOD_NAMES
from hamu.training.method_settings import MethodConfig

entries = pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in METHODS.items()])
BRANCHES = {"direct", "rectified", "colinear", "infeasible", "zero_forget_grad", "combined"}


def pair(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 3), (4,), (2, 2, 3, 3))
    retain, forget = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return retain, forget


def test_names_are_those_of_the_torch_free_list() -> None:
    assert set(METHODS) == set(METHOD_NAMES)
    assert len(METHOD_NAMES) == len(set(METHOD_NAMES))
    assert set(HAMU_METHODS) == {name for name, method in METHODS.items() if method.is_constrained}


def test_default_hyper_parameters_are_those_of_the_command_line() -> None:
    """The engine may be used without a configuration; the two must not drift apart."""
    defaults = dataclasses.asdict(MethodSettings())
    assert defaults == {name: getattr(MethodConfig(), name) for name in defaults}


def test_only_hamu_u_swaps_roles_and_only_gru_averages() -> None:
    assert [name for name, method in METHODS.items() if method.swaps_roles] == ["hamu-u"]
    assert [name for name, method in METHODS.items() if method.averages_retain] == ["gru"]


def test_catalog_holds_the_promised_methods() -> None:
    assert {"hamu-q", "hamu-u", "ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad"} <= set(METHODS)


def test_names_can_be_read_without_torch() -> None:
    code = "import sys; import hamu.methods.names as n; assert n.METHOD_NAMES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@entries
def test_entry_says_what_it_is_and_where_it_comes_from(method: Method) -> None:
    assert METHODS[method.name] is method
    assert find_method(method.name) is method
    assert method.name == method.name.lower()
    assert method.summary.strip()
    assert "\n" not in method.summary
    assert method.source.strip()
    assert "Source" in (method.rule.__doc__ or "") or "arXiv" in (method.rule.__doc__ or "")
    assert method.retain is not None or method.forget is not None
    assert method.is_paired == (method.retain is not None and method.forget is not None)


@entries
def test_entry_cannot_be_changed(method: Method) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@entries
def test_objectives_read_the_original_model_exactly_where_the_entry_says_so(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, original = torch.randn(2, 6, 4, generator=generator)
    labels = torch.randint(4, (6,), generator=generator)
    reads = []
    for role, factory in (("retain", method.retain), ("forget", method.forget)):
        if factory is None:
            continue
        objective = factory(MethodSettings())
        losses = objective(logits, labels, original)
        assert losses.shape == (6,)
        try:
            without = objective(logits, labels, None)
        except AssertionError:
            reads.append(role)
        else:
            assert torch.equal(without, losses)
    assert tuple(reads) == method.reads_original
    assert method.needs_original == bool(reads)


@entries
@pytest.mark.parametrize("full_grad", [False, True])
def test_entry_works_through_combine_gradients(method: Method, full_grad: bool) -> None:
    retain, forget = pair()
    step = combine_gradients(method.name, retain, forget, lr=0.1, constraint=0.01, full_grad=full_grad)
    assert [update.shape for update in step.updates] == [grad.shape for grad in retain]
    assert all(update.isfinite().all() for update in step.updates)
    assert any(update.any() for update in step.updates)
    assert set(step.branches) <= BRANCHES
    assert len(step.branches) == len(step.constraints) == len(retain)
    assert step.stop_reason is None
    # float32 updates against float64 predictions: 50 products, each with three roundings of 6e-8.
    for change, grads in ((step.predicted_retain_change, retain), (step.predicted_forget_change, forget)):
        actual = sum(float((g.double() * u.double()).sum()) for g, u in zip(grads, step.updates, strict=True))
        size = sum(float(g.norm() * u.norm()) for g, u in zip(grads, step.updates, strict=True))
        assert abs(change - actual) <= 1e-6 * size


@entries
def test_only_hamu_methods_read_a_constraint_a_radius_and_a_split(method: Method) -> None:
    retain, forget = pair()
    plain = combine_gradients(method.name, retain, forget, lr=0.1)
    other = combine_gradients(method.name, retain, forget, lr=0.1, constraint=0.02, radius=0.05, split="uniform")
    same = all(torch.equal(a, b) for a, b in zip(plain.updates, other.updates, strict=True))
    assert same == (not method.is_constrained)
    assert any(plain.constraints) is False
    assert any(other.constraints) == method.is_constrained


@entries
def test_update_does_not_read_the_role_that_the_method_lacks(method: Method) -> None:
    retain, forget = pair()
    other, _ = pair(seed=1)
    before = combine_gradients(method.name, retain, forget, lr=0.1).updates
    changed = combine_gradients(method.name, other, forget, lr=0.1).updates
    assert all(torch.equal(a, b) for a, b in zip(before, changed, strict=True)) == (method.retain is None)
    changed = combine_gradients(method.name, retain, other, lr=0.1).updates
    assert all(torch.equal(a, b) for a, b in zip(before, changed, strict=True)) == (method.forget is None)


@entries
def test_update_descends_the_retain_objective_or_ascends_the_forget_objective(method: Method) -> None:
    """With orthogonal gradients every rule moves each loss in its own direction only."""
    retain, forget = [torch.tensor([2.0, 0.0, 0.0])], [torch.tensor([0.0, 3.0, 0.0])]
    step = combine_gradients(method.name, retain, forget, lr=0.1)
    assert step.predicted_retain_change <= 0 <= step.predicted_forget_change
    assert (step.predicted_retain_change, step.predicted_forget_change) != (0, 0)
    assert float(step.updates[0][2]) == 0


@pytest.mark.parametrize(
    ("given", "nearest"), [("hamuq", "hamu-q"), ("hamu_u", "hamu-u"), ("pc-grad", "pcgrad"), ("g-diff", "gdiff")]
)
def test_unknown_method_names_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown method '{given}'; did you mean '{nearest}'") as caught:
        find_method(given)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in METHOD_NAMES)
