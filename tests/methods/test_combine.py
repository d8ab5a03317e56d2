"""`combine_gradients` on every dtype, shape and memory order, and on wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hamu import combine_gradients
from hamu.errors import ConfigError
from hamu.methods.names import HAMU_METHODS, METHOD_NAMES

LR = 0.25  # a power of two: products with it are exact


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


X, Y = vector(1, 0), vector(0, 1)

# ---- dtypes, shapes, memory order


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_channels_last_gradients_give_the_step_of_contiguous_ones(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    retain, forget = (torch.randn(8, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"lr": LR, "constraint": 0.1}
    plain = combine_gradients(method, [retain], [forget], **options)
    last = torch.channels_last
    for pair in (
        ([retain.contiguous(memory_format=last)], [forget.contiguous(memory_format=last)]),
        ([retain.contiguous(memory_format=last)], [forget]),
        ([retain], [forget.contiguous(memory_format=last)]),
    ):
        step = combine_gradients(method, *pair, **options)
        # The same sums in another order: EPS / sin^2 of two random vectors of 288 numbers.
        torch.testing.assert_close(step.updates[0], plain.updates[0], rtol=1e-12, atol=1e-14)
        assert step.updates[0].stride() == pair[0][0].stride()


def test_empty_and_scalar_blocks_are_blocks() -> None:
    retain, forget = (
        [torch.zeros(0), torch.tensor(2.0), torch.ones(2, 0)],
        [torch.zeros(0), torch.tensor(-1.0), torch.ones(2, 0)],
    )
    for method in METHOD_NAMES:
        step = combine_gradients(method, retain, forget, lr=LR, constraint=0.25)
        assert [update.shape for update in step.updates] == [(0,), (), (2, 0)]
        assert step.stop_reason is None
        assert float(step.updates[1]) != 0


@pytest.mark.parametrize(
    ("retain_dtype", "forget_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_gradients_of_different_dtypes_combine(method: str, retain_dtype: torch.dtype, forget_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    retain, forget = (torch.randn(3, 50, generator=generator) for _ in range(2))
    retain, forget = list(retain.to(retain_dtype)), list(forget.to(forget_dtype))
    step = combine_gradients(method, retain, forget, lr=LR, constraint=0.1)
    exact = combine_gradients(method, [g.double() for g in retain], [g.double() for g in forget], lr=LR, constraint=0.1)
    for update, expected in zip(step.updates, exact.updates, strict=True):
        error = float((update.double() - expected).norm())
        assert error <= 1e-6 * float(expected.norm())  # three float32 roundings; a product rounded to bfloat16 would err by 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", HAMU_METHODS)
def test_half_precision_gradients_still_meet_the_constraint(method: str, dtype: torch.dtype) -> None:
    """Steps are lr times smaller than gradients: float16 would underflow to nothing, bfloat16 miss by a percent."""
    generator = torch.Generator().manual_seed(2)
    retain, forget = ([1e-4 * torch.randn(40, generator=generator).to(dtype) for _ in range(3)] for _ in range(2))
    lr = 1e-4
    reach = lr * sum(float(a.double().norm() * b.double().norm()) for a, b in zip(retain, forget, strict=True))
    step = combine_gradients(method, retain, forget, lr=lr, constraint=0.9 * reach)
    bound, sign = (forget, 1) if method == "hamu-q" else (retain, -1)
    gained = sign * sum(float((g.double() * u.double()).sum()) for g, u in zip(bound, step.updates, strict=True))
    assert step.stop_reason is None
    assert gained == pytest.approx(0.9 * reach, rel=1e-5, abs=0)  # float32 rounding of the updates


def test_mixed_dtypes_among_blocks_combine() -> None:
    retain = [torch.ones(3), torch.ones(2, dtype=torch.float64)]
    step = combine_gradients("gdiff", retain, [-2 * g for g in retain], lr=LR)
    for update in step.updates:
        assert torch.equal(update.double(), torch.full_like(update, -1.5 * LR, dtype=torch.float64))


def test_gradients_that_carry_a_graph_are_read_as_numbers() -> None:
    """As `torch.autograd.grad(..., create_graph=True)` gives them."""
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    (retain,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    step = combine_gradients("hamu-q", [retain], [torch.tensor([1.0, -1.0])], lr=LR, constraint=0.1)
    assert not step.updates[0].requires_grad


def test_any_sequence_will_do_and_the_updates_can_be_added_to_weights() -> None:
    model = torch.nn.Linear(3, 2)
    params = list(model.parameters())
    grads = torch.autograd.grad(model(torch.ones(4, 3)).sum(), params)
    before = [p.detach().clone() for p in params]
    step = combine_gradients("ft", grads, iter([torch.zeros_like(g) for g in grads]), lr=LR)
    with torch.no_grad():
        torch._foreach_add_(params, step.updates)
    for param, old, grad in zip(params, before, grads, strict=True):
        assert torch.equal(param, old - LR * grad)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_lr_may_be_none_where_a_radius_is_given(method: str) -> None:
    step = combine_gradients(method, [X], [Y], radius=0.5, constraint=0.25)
    assert math.isnan(step.max_constraint_ratio)
    assert step.updates[0].any()
    with_lr = combine_gradients(method, [X], [Y], lr=LR, radius=0.5, constraint=0.25)
    assert torch.equal(step.updates[0], with_lr.updates[0])
    assert with_lr.max_constraint_ratio == 2.0  # radius ||g|| / lr


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"method": "hamuq"}, ("unknown method", "'hamuq'", "did you mean 'hamu-q'")),
        ({"split": "gradnorm"}, ("unknown split", "'gradnorm'", "did you mean 'grad_norm'", "softmax_dp")),
        ({"on_infeasible": "contine"}, ("on_infeasible", "'contine'", "did you mean 'continue'")),
        ({"constraint": -0.1}, ("constraint", "-0.1", ">= 0", "use 0")),
        ({"constraint": math.nan}, ("constraint", "nan", "finite")),
        ({"constraint": math.inf}, ("constraint", "inf", "finite")),
        ({"radius": 0.0}, ("radius", "0.0", "> 0", "None")),
        ({"radius": -1.0}, ("radius", "-1.0", "> 0")),
        ({"radius": math.nan}, ("radius", "nan")),
        ({"radius": math.inf}, ("radius", "inf")),
        ({"lr": 0.0}, ("lr", "0.0", "> 0", "positive")),
        ({"lr": -1e-4}, ("lr", "-0.0001", "> 0")),
        ({"lr": math.nan}, ("lr", "nan", "finite")),
        ({"lr": math.inf}, ("lr", "inf", "finite")),
        ({"lr": None}, ("lr", "None", "hamu-q", "radius")),
        ({"lr": None, "radius": 0.5, "method": "gdiff"}, ("lr", "None", "gdiff", "give lr")),
        ({"retain_grads": []}, ("0 retain", "1 forget", "one of each")),
        ({"retain_grads": [], "forget_grads": []}, ("0 retain", "0 forget", "one of each")),
        ({"retain_grads": [X, X]}, ("2 retain", "1 forget", "one of each")),
        ({"retain_grads": [vector(1, 2, 3)]}, ("equal shapes",)),
        ({"retain_grads": [X.view(1, 2)]}, ("equal shapes",)),
        ({"retain_grads": [None]}, ("None", "zeros")),
        ({"forget_grads": [None]}, ("None", "zeros")),
    ],
)
def test_bad_argument_gives_one_line_with_value_rule_and_mend(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    given = {"method": "hamu-q", "retain_grads": [X], "forget_grads": [Y], "lr": LR, **arguments}
    with pytest.raises(ConfigError) as caught:
        combine_gradients(**given)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
