"""How much memory a run will take in each of its processes, before it starts; and how much it took.

The activations are measured, not modelled: a pass over one row and one over two tell what a row adds to what the backward pass
keeps, and a batch is that many rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hamu.scores import cross_entropy_rows
from hamu.training.engine import PRECISIONS

if TYPE_CHECKING:
    from hamu.tasks.base import Task

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_STATUS = Path("/proc/self/status")
_DEVICE_WORDS = ("CUDA error", "CUBLAS_STATUS", "cuDNN error", "CUDNN_STATUS", "can't allocate memory")
_DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one process, by what holds them. Left out: the libraries' own, and the allocator's slack."""

    weights: int
    gradients: int
    """The buffers of the gradient pair; of several processes each has its role's, and the shards that it owns."""
    optimizer: int
    original: int
    """The frozen original model, for methods that need it."""
    activations: int
    """What the forward pass of one batch keeps for the backward pass."""
    data: int
    """The task's rows, on the device."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())

    def describe(self) -> str:
        """In a few words, for people: the total, then its parts, the largest first."""
        parts = sorted(dataclasses.asdict(self).items(), key=lambda part: -part[1])
        said = ", ".join(f"{name} {_size(value)}" for name, value in parts if value)
        return f"about {_size(self.total)} a process ({said}), besides Python and its libraries"


def estimate_memory(
    task: Task,
    model: nn.Module,
    *,
    optimizer_name: str,
    size: int,
    batch_size: int,
    precision: str,
    needs_original: bool,
) -> MemoryEstimate:
    """Estimate what each process of a run takes. The model's mode and gradients, and the random state, are left as they are.

    Args:
        task: data and batches.
        model: on the task's device.
        optimizer_name: "sgd" (no state) or "adamw" (two numbers a parameter).
        size: processes that share a step; 1: sequential.
        batch_size: rows of a pass.
        precision: "fp32", "bf16" or "fp16", of the passes.
        needs_original: whether the method reads the original model.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    weights = _bytes_of([*model.parameters(), *model.buffers()])
    trained = _bytes_of(params)
    shards = 2 * trained if size == 2 else trained * 2 + 2 * trained // size  # own role and what arrives; a table besides
    one, two = (_kept_for_backward(task, model, n_rows, precision) for n_rows in (1, 2))
    return MemoryEstimate(
        weights=weights,
        gradients=2 * trained if size == 1 else shards,
        optimizer=2 * trained if optimizer_name == "adamw" else 0,
        original=weights if needs_original else 0,
        activations=one + max(0, two - one) * (batch_size - 1),
        data=task.n_bytes,
    )


def peak_memory(device: torch.device | str) -> int:
    """The most memory that this process has held since `reset_peak_memory`: on its GPU, or on a CPU its resident set, bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device | str) -> None:
    """Let `peak_memory` count from here, where the system can (Linux, CUDA)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what `keep_freed_memory` has kept of the last run is not this one's
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees for the next one, where the C library is glibc.

    By default glibc gives large blocks back to the system and asks for them again, zeroed, at every step: of a ResNet-20 step at
    batch 256 on a CPU about a tenth. The process then stays at its peak.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # An older glibc takes 32 MiB at most. Were none taken, the other setting alone would make it slower than it is.
        if mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25):
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_device_error(error: BaseException) -> bool:
    """Whether an error leaves the process unfit for more: out of memory, or an error of the accelerator or its libraries."""
    return isinstance(error, _DEVICE_ERRORS) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_WORDS)
    )


def _kept_for_backward(task: Task, model: nn.Module, n_rows: int, precision: str) -> int:
    """Bytes that a forward pass over some forget rows keeps for the backward pass, parameters and buffers excluded."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    modes = {module: module.training for module in model.modules()}
    model.eval()  # one row is too few for BatchNorm's statistics, and none are to change
    autocast = torch.autocast(task.device.type, dtype=dtype) if (dtype := PRECISIONS[precision]) else contextlib.nullcontext()
    try:
        batch: Any = task.batch("forget", torch.arange(n_rows) % task.n_rows("forget"))
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            # The graph must live until all is counted, so that no storage is used twice.
            losses = cross_entropy_rows(task.logits(model, batch), batch.labels)
        del losses
    finally:
        for module, mode in modes.items():
            module.training = mode
    return sum(kept.values())


def _bytes_of(tensors: list[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
