"""How often a step reads the device, and how many operations it takes: neither grows with the number of blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hamu import combine_gradients
from hamu.methods.catalog import METHODS

LR = 0.25  # a power of two: products with it are exact
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
