"""How the trials of a sweep pair their gradients: in one process each, or split over workers. One way for a whole sweep."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hamu.errors import ConfigError

if TYPE_CHECKING:
    from launch.plan import Plan

SPLIT = "split-gpu"
SHARED_BY_ALL = ("gradient_pairing", "num_workers", "backend", "ddp_timeout")


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What a slot must hold. backend: of the workers' process group; None: NCCL on GPUs, gloo on cores. timeout_s: seconds
    after which a worker that does not answer is given up; None: the default."""

    n_workers: int = 1
    backend: str | None = None
    timeout_s: float | None = None

    @property
    def is_split(self) -> bool:
        """Whether a trial has workers of its own."""
        return self.n_workers > 1


def check_one_value(name: str, values: Collection[Any]) -> None:
    """Refuse several values of a setting that is one for all trials.

    Raises:
        ConfigError: as said.
    """
    if name in SHARED_BY_ALL and len(values) > 1:
        listed = ", ".join(sorted(map(str, values)))
        raise ConfigError(
            f"{name} {listed}: the trials of a sweep share their processes, so {name} is the same for all; "
            f"run one sweep for each, with --set {name}=..."
        )


def pairing_of(plan: Plan) -> Pairing:
    """The pairing of a plan's trials.

    Raises:
        ConfigError: they differ; slots are held from trial to trial.
    """
    found: dict[str, set[Any]] = {name: set() for name in SHARED_BY_ALL}
    for config in plan.configs.values():
        flat = config.to_flat()
        for name, values in found.items():
            values.add(flat.get(name))
    for name, values in found.items():
        check_one_value(name, values)
    only = {name: next(iter(values), None) for name, values in found.items()}
    if only["gradient_pairing"] != SPLIT:
        return Pairing()
    return Pairing(n_workers=only["num_workers"] or 1, backend=only["backend"], timeout_s=only["ddp_timeout"])
