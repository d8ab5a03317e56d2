"""Which training rows are forgotten: indices with their provenance and a hash.

The draw is a fixed recipe on numpy's `default_rng` (PCG64), so that a seed names the same rows on every machine, and
the same rows as in published runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hamu.data.hashing import sha256_arrays
from hamu.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class ForgetSet:
    """The rows to forget and the rows to keep, numbered as in the training split.

    Two sets are the same iff their `sha256` are.
    """

    forget: np.ndarray
    """(n_forget,) int64, in the order of the draw."""
    retain: np.ndarray
    """(n_retain,) int64; disjoint from `forget`, and together they cover the split."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the set came about: rule, class, rho, seed, split_ratio, n_rows."""
    sha256: str = ""
    """64 hex digits over both index arrays; computed when not given."""

    def __post_init__(self) -> None:
        if len(self.forget) == 0:
            raise DataError(
                f"the forget set is empty ({_describe(self.provenance)}); it needs at least one row: choose another "
                "forget_class, or a larger split_ratio at rho 1"
            )
        if len(self.retain) == 0:
            raise DataError(
                f"the retain set is empty ({_describe(self.provenance)}); it needs at least one row: forget fewer rows"
            )
        if not self.sha256:
            object.__setattr__(self, "sha256", sha256_arrays(self.forget, self.retain))


def draw_forget_set(labels: np.ndarray, *, forget_class: int, rho: float, seed: int, split_ratio: float = 0.1) -> ForgetSet:
    """Draw the rows to forget: one class, with a share `rho` of it swapped for random others.

    With K the rows of the class and m = int(rho |K|): rho = 0 forgets K; 0 < rho < 1 forgets |K| - m rows of K and m
    drawn from all the other rows, the m left-over rows of K among them; rho = 1 forgets a random ceil(split_ratio n)
    rows. The retain set is all other rows in order (at rho = 1 in the order of the draw).

    Args:
        labels: (n,) integers, the training labels in row order.
        forget_class: a class that has rows.
        rho: share swapped, in [0, 1].
        seed: of numpy's `default_rng`, at least 0.
        split_ratio: share of all rows forgotten at rho = 1, in [0, 1].

    Raises:
        ConfigError: `rho`, `seed` or `split_ratio` is out of range.
        DataError: the class has no rows, or one of the two sets is empty.

    Source: the draw of the published HAMU runs (arXiv 2606.02119).
    """
    if not 0.0 <= rho <= 1.0:  # NaN fails here too
        raise ConfigError(f"rho (hard_probability) is {rho}; it is the share of the class that is swapped: give 0 to 1")
    if not 0.0 <= split_ratio <= 1.0:
        raise ConfigError(f"split_ratio is {split_ratio}; it is the share of all rows forgotten at rho 1: give 0 to 1")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it seeds numpy's default_rng: give 0 or more")
    labels = np.asarray(labels)
    of_class = np.flatnonzero(labels == forget_class)
    if of_class.size == 0:
        raise DataError(f"forget_class is {forget_class}, which has no training rows; {_known_classes(labels)}")

    rng = np.random.default_rng(seed)
    n_rows = len(labels)
    n_swapped = int(rho * of_class.size)
    retain: np.ndarray | None = None
    if rho == 0.0:
        rule, forget = "class", of_class
    elif rho < 1.0:
        rule = "class with random rows"
        shuffled = rng.permutation(of_class)
        left_over, kept = shuffled[:n_swapped], shuffled[n_swapped:]
        pool = rng.permutation(np.concatenate((np.flatnonzero(labels != forget_class), left_over)))
        forget = np.concatenate((kept, pool[:n_swapped]))
    else:
        rule = "random"
        n_forget = math.ceil(split_ratio * n_rows)
        order = rng.permutation(n_rows)
        forget, retain = order[:n_forget], order[n_forget:]
    if retain is None:
        retain = np.setdiff1d(np.arange(n_rows), forget, assume_unique=True)
    return ForgetSet(
        forget=forget.astype(np.int64),
        retain=retain.astype(np.int64),
        provenance={
            "rule": rule,
            "forget_class": int(forget_class),
            "rho": float(rho),
            "seed": int(seed),
            "split_ratio": float(split_ratio),
            "n_rows": n_rows,
        },
    )


def _known_classes(labels: np.ndarray) -> str:
    classes = np.unique(labels).tolist()
    if not classes:
        return "the training split has no rows"
    if classes == list(range(classes[0], classes[-1] + 1)):
        return f"give a class of {classes[0]} to {classes[-1]}"
    return f"give one of {', '.join(map(str, classes[:20]))}{', ...' if len(classes) > 20 else ''}"


def _describe(provenance: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in provenance.items()) or "no provenance"
