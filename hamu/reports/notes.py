"""How to read a report: what its axes, its choice and its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hamu.reports.summary import not_compared_text
from hamu.reports.tables import MAX_RETAIN_ACCURACY_LOSS


def notes_html(summary: Mapping[str, Any]) -> str:
    """The notes to a summary as an HTML list, for the view that it is in."""
    percent = f"{100 * MAX_RETAIN_ACCURACY_LOSS:g}"
    is_reference = summary["view"] == "reference"
    axes = (
        "Axes (reference view): closeness is the share of the way from the original (0) to a retrained model (1), which was "
        "never shown the forgotten rows, that a trial went on those: the mean over loss, accuracy and membership AUC, and "
        "over-shoot counts as distance. Retain utility is minus the rise of the retain loss from the original, in nats. Up and "
        "right is better; the original is at (0, 0).",
        "The tables show the paper view's forget quality too, the rise of the forget loss from the original in nats. It has no "
        "upper end and rewards over-forgetting: a model that is confidently wrong on the forgotten rows scores higher than one "
        "that was never shown them.",
    )
    paper = (
        "Axes (paper view), both in nats and from the original model: forget quality is the rise of the forget loss, "
        "retain utility is minus the rise of the retain loss. Up and right is better; the original is at (0, 0).",
        "This view has no upper end and rewards over-forgetting: a model that is confidently wrong on the forgotten "
        "rows, as after gradient ascent, scores higher than one that was never shown them. A membership AUC far from "
        "0.5 on either side is a sign of it; this report has no retrained model to compare"
        + (" all trials with." if summary.get("not_compared") else " with."),
    )
    counts = (
        ""
        if is_reference
        else " Forget quality counts up to 2 ln(classes), twice the loss of a guess; of those that reach it, the one of highest "
        "retain utility is taken."
    )
    notes: tuple[str, ...] = (
        *([f"{missing}."] if (missing := not_compared_text(summary)) else []),
        *(axes if is_reference else paper),
        "The setting to use is the trial of the front with the most forgetting among those whose retain accuracy is at "
        f"most {percent} % under the original's.{counts} It was chosen and is reported on the same rows, so "
        "expect a little less on others.",
        "The hypervolume is the area between the front and the point of no forgetting and a retain loss risen by that of a "
        "guess, ln(classes)"
        + (", in nats." if is_reference else "; forget quality counts up to 2 ln(classes) in it, in nats squared."),
        "Test rows hold all classes, so the test accuracy falls by the forgotten class's share where a whole class is forgotten.",
        "The ratio is the constraint divided by the learning rate; where the trials say so, it is given as a share of S at "
        "the first step. S is the sum over blocks of the product of the "
        "lengths of the clipped retain and forget gradients; it bounds the ratio from above and shrinks as the model "
        "converges. A HAMU trial whose ratio asks for more than the gradients allow stops as infeasible; one that did "
        "so before its first step is the original model.",
    )
    if summary.get("timing"):
        notes = (
            "Times are of the steps alone where they were taken apart, else of the training with its evaluations. A trial's "
            "first steps warm caches up; trials that ran beside others shared the machine. Peak memory is of each process, of "
            "the GPU where there is one.",
        )
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"
