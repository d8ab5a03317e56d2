"""What the instance types of AWS and GCP have, as far as sweeps use them: cores, GPUs, and the memory of one GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """cpus: what the provider calls vCPUs. gpu_memory_bytes: of one GPU."""

    cpus: int
    gpus: int = 0
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None

    def resources(self) -> dict[str, int]:
        """As a cluster file says it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def _with_gpus(cpus: int, gpus: int, name: str, gib: int) -> NodeType:
    return NodeType(cpus=cpus, gpus=gpus, gpu_name=name, gpu_memory_bytes=gib * _GIB)


# Source: the providers' pages on GPU instances (EC2 accelerated computing; Compute Engine accelerator-optimized machines).
NODE_TYPES: dict[str, NodeType] = {
    "p4d.24xlarge": _with_gpus(96, 8, "NVIDIA A100 40GB", 40),
    "p4de.24xlarge": _with_gpus(96, 8, "NVIDIA A100 80GB", 80),
    "p5.48xlarge": _with_gpus(192, 8, "NVIDIA H100 80GB", 80),
    "g5.xlarge": _with_gpus(4, 1, "NVIDIA A10G", 24),
    "g5.2xlarge": _with_gpus(8, 1, "NVIDIA A10G", 24),
    "g5.12xlarge": _with_gpus(48, 4, "NVIDIA A10G", 24),
    "g5.48xlarge": _with_gpus(192, 8, "NVIDIA A10G", 24),
    "g6.xlarge": _with_gpus(4, 1, "NVIDIA L4", 24),
    "m5.large": NodeType(cpus=2),
    "m5.xlarge": NodeType(cpus=4),
    "m5.2xlarge": NodeType(cpus=8),
    "m5.4xlarge": NodeType(cpus=16),
    "a2-highgpu-1g": _with_gpus(12, 1, "NVIDIA A100 40GB", 40),
    "a2-highgpu-2g": _with_gpus(24, 2, "NVIDIA A100 40GB", 40),
    "a2-highgpu-4g": _with_gpus(48, 4, "NVIDIA A100 40GB", 40),
    "a2-highgpu-8g": _with_gpus(96, 8, "NVIDIA A100 40GB", 40),
    "a2-megagpu-16g": _with_gpus(96, 16, "NVIDIA A100 40GB", 40),
    "a2-ultragpu-1g": _with_gpus(12, 1, "NVIDIA A100 80GB", 80),
    "a2-ultragpu-2g": _with_gpus(24, 2, "NVIDIA A100 80GB", 80),
    "a2-ultragpu-4g": _with_gpus(48, 4, "NVIDIA A100 80GB", 80),
    "a2-ultragpu-8g": _with_gpus(96, 8, "NVIDIA A100 80GB", 80),
    "a3-highgpu-8g": _with_gpus(208, 8, "NVIDIA H100 80GB", 80),
    "g2-standard-4": _with_gpus(4, 1, "NVIDIA L4", 24),
}

_CORES_ONLY = re.compile(r"(?:n1|n2|n2d|e2|c2|c3)-(?:standard|highmem|highcpu)-(\d+)")


def node_type(name: str | None) -> NodeType | None:
    """The instance type of that name; None: not known here."""
    found = NODE_TYPES.get(name or "")
    if found is None and (match := _CORES_ONLY.fullmatch(name or "")):
        return NodeType(cpus=int(match[1]))
    return found
