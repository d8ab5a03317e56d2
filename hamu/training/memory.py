"""How much memory a run will take in each of its processes, before it starts; and how much it took.

The passes are measured, not modelled: the gradients of one row and of two tell what a row adds to the most that is held at once,
and a batch is that many rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import resource
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hamu.training.engine import BATCH_NORM, PairedEngine
from hamu.training.pairs import FORGET, RETAIN

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
    """The most that the passes over a batch hold at once: what the forward pass keeps, logits, what the backward pass needs."""
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


def estimate_memory(task: Task, engine: PairedEngine, *, optimizer_name: str, size: int, batch_size: int) -> MemoryEstimate:
    """Estimate what each process of a run takes. The engine's gradients are overwritten; the model and its mode, and the random
    state, are left as they are.

    Args:
        task: rows and batches.
        engine: of the run; its passes are measured, those of the original model too.
        optimizer_name: "sgd" (no state) or "adamw" (two numbers a parameter).
        size: processes that share a step; 1: sequential.
        batch_size: rows of a pass.
    """
    model = engine.model
    trained = _bytes_of(engine.params)
    shards = 2 * trained if size == 2 else trained * 2 + 2 * trained // size  # own role and what arrives; a table besides
    splits = [split for split, role in (("retain", engine.method.retain), ("forget", engine.method.forget)) if role]
    one, two = (_most_held(task, engine, n_rows) for n_rows in (1, 2))
    n_probes = max(task.n_probes(split, batch_size) for split in splits)
    original = engine.original
    return MemoryEstimate(
        weights=_bytes_of([*model.parameters(), *model.buffers()]),
        gradients=2 * trained if size == 1 else shards,
        optimizer=2 * trained if optimizer_name == "adamw" else 0,
        original=_bytes_of([*original.parameters(), *original.buffers()])
        if isinstance(original, nn.Module)
        else getattr(original, "n_bytes", 0),
        activations=int(one + max(0, two - one) * (n_probes - 1)),
        data=task.n_bytes,
    )


def cap_memory(device: torch.device | str, share: float | None) -> None:
    """Let this process take no more than a share of its GPU's memory, in (0, 1]; None, or a CPU: no cap.

    What would take more ends as out of memory in this process, and leaves the others that share the GPU theirs.
    """
    device = torch.device(device)
    if device.type == "cuda" and share is not None and share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device.index)


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


class _Held(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while they live; those in `known` are not counted."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, n_bytes = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += n_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, place, n_bytes).atexit = False

    def _forget(self, place: int, n_bytes: int) -> None:
        self._known.discard(place)
        self.now -= n_bytes


def _most_held(task: Task, engine: PairedEngine, n_rows: int) -> int:
    """The most bytes that the passes of both roles over some rows each hold at once, beside what outlives them."""
    model, method, pair = engine.model, engine.method, engine.pair
    splits = (method.retain and "retain", method.forget and "forget")
    lasting: list[Any] = [*model.parameters(), *model.buffers(), *engine.params, pair.table]
    if not isinstance(engine.original, nn.Module):
        lasting += getattr(engine.original, "weights", [])
    else:
        lasting += [*engine.original.parameters(), *engine.original.buffers()]
    for role in (RETAIN, FORGET):
        lasting += pair.views(role) or []
    modes = {module: module.training for module in model.modules()}
    grads = [param.grad for param in engine.params]
    engine.set_training_mode()
    for module in model.modules():
        if isinstance(module, BATCH_NORM):
            module.eval()  # one row is too few for its statistics, and none are to change
    held = _Held({tensor.untyped_storage()._cdata for tensor in lasting if tensor is not None})
    try:
        with torch.random.fork_rng(), held:
            engine.gradients(*([task.batch(s, task.probe_rows(s, n_rows))] if s else [] for s in splits))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for param, grad in zip(engine.params, grads, strict=True):
            param.grad = grad
    return held.most


def _bytes_of(tensors: list[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
