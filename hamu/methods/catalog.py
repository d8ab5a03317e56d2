"""METHODS: one literal entry a method. To add one: its objectives, its rule in core.py, its name in names.py, an entry here.

The suite in tests/methods/test_catalog.py runs over every entry.
"""

from __future__ import annotations

from hamu.errors import ConfigError, unknown
from hamu.methods import core
from hamu.methods.base import Method
from hamu.methods.objectives import cross_entropy, kl_to_original, weighted

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="hamu-q",
            summary="lowers the retain loss most among steps that raise the forget loss by the constraint",
            source="arXiv 2606.02119",
            rule=core.hamu_q,
            retain=lambda settings: cross_entropy,
            forget=lambda settings: cross_entropy,
            is_constrained=True,
        ),
        Method(
            name="hamu-u",
            summary="raises the forget loss most among steps that lower the retain loss by the constraint",
            source="arXiv 2606.02119",
            rule=core.hamu_u,
            retain=lambda settings: cross_entropy,
            forget=lambda settings: cross_entropy,
            is_constrained=True,
            swaps_roles=True,
        ),
        Method(
            name="ft",
            summary="fine-tunes on retain rows",
            source="arXiv 2304.04934, baselines",
            rule=core.descend_retain,
            retain=lambda settings: cross_entropy,
            forget=None,
        ),
        Method(
            name="ga",
            summary="ascends the forget loss",
            source="arXiv 2304.04934, baselines",
            rule=core.ascend_forget,
            retain=None,
            forget=lambda settings: cross_entropy,
        ),
        Method(
            name="gdiff",
            summary="descends the retain loss and ascends the forget loss alike",
            source="arXiv 2401.06121, baselines",
            rule=core.half_difference,
            retain=lambda settings: cross_entropy,
            forget=lambda settings: cross_entropy,
        ),
        Method(
            name="kl",
            summary="stays near the original's outputs on retain rows, ascends the forget loss",
            source="arXiv 2401.06121, baselines",
            rule=core.half_difference,
            retain=lambda settings: kl_to_original,
            forget=lambda settings: cross_entropy,
            reads_original=("retain",),
        ),
        Method(
            name="scrub",
            summary="student leaves the original on forget rows, follows it and the labels on retain rows",
            source="arXiv 2302.09880, in the paired form of arXiv 2606.02119",
            rule=core.half_difference,
            retain=lambda settings: weighted(settings.scrub_alpha, kl_to_original, settings.scrub_gamma, cross_entropy),
            forget=lambda settings: kl_to_original,
            reads_original=("retain", "forget"),
        ),
        Method(
            name="gru",
            summary="ascends the forget loss with the part against the retain set projected off",
            source="arXiv 2503.09117, without moving average unless gru_beta is set",
            rule=core.gru,
            retain=lambda settings: cross_entropy,
            forget=lambda settings: cross_entropy,
            one_block=True,
            averages_retain=True,
        ),
        Method(
            name="pcgrad",
            summary="projects each objective off the other where they conflict, then averages",
            source="arXiv 2001.06782, algorithm 1",
            rule=core.pcgrad,
            retain=lambda settings: cross_entropy,
            forget=lambda settings: cross_entropy,
            one_block=True,
        ),
    )
}


def find_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        ConfigError: no method has that name.
    """
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]
