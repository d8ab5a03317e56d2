"""`combine_gradients` on degenerate input, wrong arguments, dtypes and memory orders; how often it reads the device."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hamu import combine_gradients
from hamu.errors import ConfigError
from hamu.methods.catalog import METHODS
from hamu.methods.names import HAMU_METHODS, METHOD_NAMES

LR = 0.25  # a power of two: products with it are exact


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ZERO, X, Y = vector(0, 0), vector(1, 0), vector(0, 1)

# ---- hamu-q: zero gradients on a side


def test_no_forget_gradient_and_no_constraint_is_plain_descent() -> None:
    step = combine_gradients("hamu-q", [X], [ZERO], lr=LR)
    assert step.branches == ("direct",)
    assert torch.equal(step.updates[0], -LR * X)
    fixed = combine_gradients("hamu-q", [X], [ZERO], radius=0.5)
    assert torch.equal(fixed.updates[0], -0.5 * X)


@pytest.mark.parametrize("constraint", [1e-13, 1.0])
def test_no_forget_gradient_with_a_constraint_is_infeasible(constraint: float) -> None:
    stopped = combine_gradients("hamu-q", [X], [ZERO], lr=LR, constraint=constraint)
    assert (stopped.branches, stopped.stop_reason) == (("infeasible",), "infeasible")
    assert not stopped.updates[0].any()
    kept = combine_gradients("hamu-q", [X], [ZERO], lr=LR, constraint=constraint, on_infeasible="continue")
    assert (kept.branches, kept.stop_reason) == (("zero_forget_grad",), None)
    assert not kept.updates[0].any()  # no direction raises the forget loss


def test_no_retain_gradient_takes_the_shortest_step_within_a_fixed_radius() -> None:
    step = combine_gradients("hamu-q", [ZERO], [2 * Y], radius=0.5, constraint=0.5)
    assert step.stop_reason is None
    assert torch.equal(step.updates[0], 0.25 * Y)
    assert step.predicted_forget_change == 0.5
    beyond = combine_gradients("hamu-q", [ZERO], [2 * Y], radius=0.5, constraint=1.5)
    assert beyond.stop_reason == "infeasible"


def test_no_retain_gradient_leaves_no_lr_radius() -> None:
    assert combine_gradients("hamu-q", [ZERO], [Y], lr=LR, constraint=1e-13).stop_reason == "infeasible"
    step = combine_gradients("hamu-q", [ZERO], [Y], lr=LR)
    assert step.stop_reason is None
    assert not step.updates[0].any()


@pytest.mark.parametrize("method", HAMU_METHODS)
@pytest.mark.parametrize("radius", [None, 0.5])
def test_no_gradient_at_all_moves_nothing(method: str, radius: float | None) -> None:
    free = combine_gradients(method, [ZERO, ZERO], [ZERO, ZERO], lr=LR, radius=radius)
    assert free.stop_reason is None
    assert not any(update.any() for update in free.updates)
    bound = combine_gradients(method, [ZERO, ZERO], [ZERO, ZERO], lr=LR, radius=radius, constraint=0.1)
    assert bound.stop_reason == "infeasible"
    assert sum(bound.constraints) == pytest.approx(0.1, rel=1e-15, abs=0)
    kept = combine_gradients(method, [ZERO, ZERO], [ZERO, ZERO], lr=LR, radius=radius, constraint=0.1, on_infeasible="continue")
    assert not any(update.any() for update in kept.updates)


# ---- hamu-u: the same with the roles exchanged


def test_hamu_u_without_retain_gradient_and_constraint_is_plain_ascent() -> None:
    step = combine_gradients("hamu-u", [ZERO], [Y], lr=LR)
    assert step.branches == ("direct",)
    assert torch.equal(step.updates[0], LR * Y)


def test_hamu_u_without_retain_gradient_cannot_meet_a_constraint() -> None:
    assert combine_gradients("hamu-u", [ZERO], [Y], lr=LR, constraint=1e-13).stop_reason == "infeasible"


def test_hamu_u_without_forget_gradient_takes_the_shortest_step_that_lowers_the_retain_loss() -> None:
    step = combine_gradients("hamu-u", [2 * X], [ZERO], radius=0.5, constraint=0.5)
    assert torch.equal(step.updates[0], -0.25 * X)
    assert step.predicted_retain_change == -0.5
    assert combine_gradients("hamu-u", [X], [ZERO], lr=LR, constraint=1e-13).stop_reason == "infeasible"


# ---- colinear, opposite, boundary cases


def test_colinear_gradients_give_the_shortest_step_that_meets_the_constraint() -> None:
    q = combine_gradients("hamu-q", [4 * X], [2 * X], lr=LR, constraint=0.5)
    assert q.branches == ("colinear",)
    assert torch.equal(q.updates[0], 0.25 * X)
    u = combine_gradients("hamu-u", [4 * X], [2 * X], lr=LR, constraint=0.5)
    assert u.branches == ("colinear",)
    assert torch.equal(u.updates[0], -0.125 * X)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_opposite_gradients_are_direct_up_to_the_last_feasible_constraint(method: str) -> None:
    for constraint in (0.0, 1.0, 2.0):  # lr ||g_r|| ||g_f|| = 2: both objectives want the same step
        step = combine_gradients(method, [4 * X], [-2 * X], lr=LR, constraint=constraint)
        assert step.branches == ("direct",)
        expected = -LR * 4 * X if method == "hamu-q" else LR * -2 * X
        assert torch.equal(step.updates[0], expected)
    assert combine_gradients(method, [4 * X], [-2 * X], lr=LR, constraint=2.0 + 1e-9).stop_reason == "infeasible"


def test_orthogonal_gradients_without_constraint_are_direct() -> None:
    assert combine_gradients("hamu-q", [X], [Y], lr=LR).branches == ("direct",)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("method", HAMU_METHODS)
def test_a_constraint_of_1e_13_is_a_constraint(method: str, scale: float) -> None:
    step = combine_gradients(method, [scale * X], [Y / scale], radius=0.5 * max(scale, 1 / scale), constraint=1e-13)
    assert step.branches == ("rectified",)
    gained = step.predicted_forget_change if method == "hamu-q" else -step.predicted_retain_change
    assert gained == pytest.approx(1e-13, rel=1e-12, abs=0)  # orthogonal: nothing cancels


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e14])
def test_a_tiny_forget_gradient_is_not_a_zero_one(scale: float) -> None:
    """Without constraint its direction must still not be harmed, however short it is."""
    step = combine_gradients("hamu-q", [X], [scale * (X + Y)], lr=LR)
    assert step.branches == ("rectified",)
    torch.testing.assert_close(step.updates[0], LR / math.sqrt(2) * (Y - X), rtol=1e-14, atol=0)  # a dozen roundings


def test_constraint_at_the_very_edge_uses_the_whole_radius_for_it() -> None:
    step = combine_gradients("hamu-q", [X], [Y], lr=LR, constraint=LR)
    assert step.stop_reason is None
    assert torch.equal(step.updates[0], LR * Y)


@pytest.mark.parametrize("angle", [1e-9, 1e-7, math.pi - 1e-9, math.pi - 1e-7])
def test_nearly_colinear_gradients_in_float32_give_no_step_of_rounding_noise(angle: float) -> None:
    retain = torch.tensor([1.0, 0.0])
    forget = torch.tensor([math.cos(angle), math.sin(angle)])
    step = combine_gradients("hamu-q", [retain], [forget], lr=LR, constraint=0.125)
    assert step.branches == (("colinear",) if angle < 1 else ("direct",))
    assert float(step.updates[0].norm()) <= LR * (1 + 1e-6)  # float32 rounding
    assert float(step.updates[0] @ forget) >= 0.125 * (1 - 1e-6)


# ---- infeasible: stop, continue


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_one_infeasible_block_withholds_the_whole_step(method: str) -> None:
    grads = [[X, 10 * X], [Y, 10 * Y]]
    step = combine_gradients(method, *grads, lr=LR, constraint=0.8, split="uniform")  # first block: 0.4 > 0.25
    assert step.branches == ("infeasible", "rectified")
    assert step.stop_reason == "infeasible"
    assert not any(update.any() for update in step.updates)
    assert (step.predicted_retain_change, step.predicted_forget_change) == (0, 0)
    assert step.constraints == (0.4, 0.4)
    assert step.max_constraint_ratio == pytest.approx(101, rel=1e-15, abs=0)  # still told: what would have been feasible


def test_continue_takes_the_shortest_step_that_meets_the_constraint_of_the_block() -> None:
    step = combine_gradients(
        "hamu-q", [X, 10 * X], [2 * Y, 10 * Y], lr=LR, constraint=2.0, split="uniform", on_infeasible="continue"
    )
    assert step.branches == ("infeasible", "rectified")
    assert step.stop_reason is None
    assert torch.equal(step.updates[0], 0.5 * Y)  # longer than the radius of 0.25
    u = combine_gradients("hamu-u", [2 * X], [Y], lr=LR, constraint=1.0, on_infeasible="continue")
    assert torch.equal(u.updates[0], -0.5 * X)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_positive_stopping_margins_never_withhold_updates(method: str) -> None:
    retain, forget = [vector(1, 0.1)], [vector(1, -0.05)]
    step = combine_gradients(method, retain, forget, lr=LR, constraint=0.2)
    assert min(step.stopping_margins.values()) > 0
    assert step.stopping_margin > 0
    assert step.stop_reason is None
    assert step.branches == ("rectified",)
    assert step.updates[0].any()


# ---- non-finite


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("full_grad", [False, True])
def test_non_finite_gradients_withhold_the_step_and_say_so(method: str, bad: float, role: int, full_grad: bool) -> None:
    pair = [[X.clone(), vector(1, 2, 3)], [Y.clone(), vector(3, 2, 1)]]
    pair[role][1][2] = bad
    step = combine_gradients(method, *pair, lr=LR, constraint=0.01, full_grad=full_grad, on_infeasible="continue")
    assert step.stop_reason == "non_finite"
    assert not any(update.any() for update in step.updates)
    assert [update.shape for update in step.updates] == [(2,), (3,)]
    assert not step.stopping_margin > 0  # nan: no rule fires on it
    assert len(step.branches) == 2


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


# ---- reads of the device

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "nonzero", "__array__")


class CountReads(TorchFunctionMode):
    """Counts the calls that would make the host wait for a device (on a CPU they are cheap, yet the same calls)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> Counter[str]:
        return Counter({name: self.calls[name] for name in READS if self.calls[name]})


class CountOps(TorchDispatchMode):
    """Counts the operations that reach a device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(method: str, n_blocks: int, options: dict[str, Any], *, last: bool = False) -> tuple[Counter[str], Counter[str]]:
    generator = torch.Generator().manual_seed(0)
    pair = [[torch.randn(4, 3, 3, 3, generator=generator) for _ in range(n_blocks)] for _ in range(2)]
    if last:
        pair = [[g.contiguous(memory_format=torch.channels_last) for g in role] for role in pair]
    with CountReads() as host:
        combine_gradients(method, *pair, **options)
    with CountOps() as device:
        combine_gradients(method, *pair, **options)
    return host.reads, device.calls


MODES = [
    pytest.param({"split": "grad_norm"}, id="grad_norm"),
    pytest.param({"split": "softmax_dp"}, id="softmax_dp"),
    pytest.param({"full_grad": True}, id="full_grad"),
    pytest.param({"constraint": 1e3}, id="infeasible"),
]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("options", MODES)
def test_step_reads_the_device_once_whatever_the_number_of_blocks(method: str, options: dict[str, Any]) -> None:
    options = {"lr": LR, "constraint": 0.01, **options}
    for n_blocks in (5, 65):
        reads, ops = count(method, n_blocks, options)
        assert reads == {"cpu": 1, "numpy": 1}  # one copy to the host, then a view of it
        assert ops["_local_scalar_dense"] == 0


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_number_of_operations_does_not_grow_with_the_number_of_blocks(method: str, last: bool) -> None:
    few, many = (count(method, n_blocks, {"lr": LR, "constraint": 0.01}, last=last)[1] for n_blocks in (5, 65))
    grown = {name: many[name] - few[name] for name in many if many[name] != few[name]}
    # Views, dtypes and empty meta tensors are bookkeeping of the host: no data moves.
    assert set(grown) <= {"as_strided", "empty_like", "promote_types"}
    assert sum(many.values()) - sum(many[name] for name in grown) < 60  # a foreach copy counts as one
