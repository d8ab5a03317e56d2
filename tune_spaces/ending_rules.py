"""When a search proposes no more: no gain in hypervolume, or a target met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hamu.reports.hypervolume import hypervolume
from hamu.reports.rows import is_finite, status_of
from hamu.reports.tables import pareto_front
from hamu.reports.views import View
from tune_spaces.goals import Condition, goals_text, total_violation

MIN_GAIN = 1e-3
"""Share by which the hypervolume must grow to count as grown: less is the noise of evaluations, not a better setting."""


class NoGain:
    """Ends when the hypervolume of the ended trials has not grown, by more than MIN_GAIN of itself, over the last `patience`.

    Pruned trials count as ended; dropped ones, which never ran, do not, nor failed ones, which a resumed sweep tries again. As
    long as there is no hypervolume (no trial forgot anything and kept some use yet, or the number of classes is not known) none
    counts: a search that has found nothing goes on.
    """

    def __init__(self, view: View, patience: int) -> None:
        self._view, self._patience = view, patience
        self._front: list[dict[str, Any]] = []
        self._largest, self._since_gain = 0.0, 0

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended."""
        if status_of(row) in ("dropped", "failed"):
            return
        self._front = pareto_front([*self._front, {**row, "trial_id": trial_id}], self._view)
        area = hypervolume(self._front, self._view)
        if not area:
            return
        self._since_gain += 1
        if area > self._largest * (1.0 + MIN_GAIN):
            self._largest, self._since_gain = area, 0

    @property
    def ended(self) -> str | None:
        """The reason to propose no more, or None."""
        if self._since_gain < self._patience:
            return None
        return f"the hypervolume ({self._largest:.4g}, {self._view.name} view) has not grown over {self._patience} trials"

    @property
    def at_end(self) -> str | None:
        """What to say when the trials are used up: nothing."""
        return None


class TargetMet:
    """Ends as soon as a trial meets all conditions; of several the answer is the cheapest, with the fewest training seconds."""

    def __init__(self, conditions: Sequence[Condition]) -> None:
        self._conditions = tuple(conditions)
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._misses: dict[str, float] = {}
        self._n_ended = 0
        self.answer: str | None = None
        """The cheapest trial that meets all conditions."""

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended."""
        self._n_ended += status_of(row) != "dropped"
        if status_of(row) != "finished":
            return
        self._rows[trial_id] = row
        miss = total_violation(self._conditions, row)
        if miss is not None:
            self._misses[trial_id] = miss
        if miss == 0.0 and (self.answer is None or _seconds(row) < _seconds(self._rows[self.answer])):
            self.answer = trial_id

    @property
    def text(self) -> str:
        """All conditions."""
        return " and ".join(condition.text for condition in self._conditions)

    @property
    def ended(self) -> str | None:
        """The trial that meets the target, or None."""
        if self.answer is None:
            return None
        seconds = _seconds(self._rows[self.answer])
        cost = f", {seconds:.3g} s of training" if seconds < float("inf") else ""
        return f"target {self.text} met by {self.answer} after {self._n_ended} trials{cost}: {self._stand(self.answer)}"

    @property
    def at_end(self) -> str | None:
        """How near the trials came: of each condition."""
        start = f"target {self.text} not met by {self._n_ended} trials"
        if self._misses:
            nearest = min(self._misses, key=self._misses.__getitem__)
            return f"{start}; nearest {nearest}: {self._stand(nearest)}"
        if self._rows:
            first = next(iter(self._rows))
            return f"{start}; no trial has all that it needs: {self._stand(first)}"
        return f"{start}; none finished"

    def _stand(self, trial_id: str) -> str:
        return goals_text(self._conditions, self._rows[trial_id])


def _seconds(row: Mapping[str, Any]) -> float:
    seconds = row.get("train_s")
    return float(seconds) if is_finite(seconds) else float("inf")
