"""The record that says what a method is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hamu.methods.core import Rule
from hamu.methods.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Hyper-parameters of the methods that have some.

    scrub_alpha: weight of KL(original || current) on retain rows, >= 0. scrub_gamma: weight of the cross-entropy on retain rows,
    >= 0. gru_beta: share of the current retain gradient in GRU's moving average, in [0, 1]; 0 turns the average off.
    """

    scrub_alpha: float = 0.001
    scrub_gamma: float = 0.99
    gru_beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """An unlearning method: two objectives and a combine rule.

    name: key in METHODS. summary: one line for people. source: paper, or METHODS section. rule: Gram in, weights out.
    retain, forget: given the settings, the objective whose gradient is g_r, g_f; None where the method uses no such batch.
    reads_original: the roles, of "retain" and "forget", whose objective reads the frozen original's logits. one_block: whether
    the rule reads the Gram of the whole model whatever the mode. is_constrained: whether the rule takes a constraint and a
    radius. swaps_roles: whether these limits, and the hardness of a step, are those of the pair (-g_f, -g_r). averages_retain:
    whether `gru_beta` puts a moving average in the place of g_r.
    """

    name: str
    summary: str
    source: str
    rule: Rule
    retain: Callable[[MethodSettings], Objective] | None
    forget: Callable[[MethodSettings], Objective] | None
    reads_original: tuple[str, ...] = ()
    one_block: bool = False
    is_constrained: bool = False
    swaps_roles: bool = False
    averages_retain: bool = False

    @property
    def needs_original(self) -> bool:
        """Whether a run needs the frozen original model."""
        return bool(self.reads_original)

    @property
    def is_paired(self) -> bool:
        """Whether a step needs a batch of each role; the others take both batches' rows from their one role."""
        return self.retain is not None and self.forget is not None
