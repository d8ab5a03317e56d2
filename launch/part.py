"""A share of a sweep's trials, for several one-node sweeps on one results folder, such as the tasks of a Slurm array."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hamu.errors import ConfigError
from launch.plan import Plan
from launch.standing import is_searched

_FORM = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The index-th of `count` shares, from 1."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """As in names of files: "2-of-4"."""
        return f"{self.index}-of-{self.count}"

    def plan(self, whole: Plan) -> Plan:
        """The plan of this share: every count-th trial, so that each share has some of every kind.

        Raises:
            ConfigError: the trials are chosen one after another, or there are fewer than shares.
        """
        if is_searched(whole.search) or whole.search.scheduler:
            raise ConfigError(
                f"--part {self.index}/{self.count}: a search or a scheduler chooses among all trials, so it cannot be shared "
                "out; leave --part out, or use --search grid --scheduler none"
            )
        if self.count > len(whole.trials):
            raise ConfigError(f"--part {self.index}/{self.count}: there are {len(whole.trials)} trials only; give fewer parts")
        trials = whole.trials[self.index - 1 :: self.count]
        originals, references = {trial.original for trial in trials}, {trial.reference for trial in trials}
        return replace(
            whole,
            trials=trials,
            originals={key: config for key, config in whole.originals.items() if key in originals},
            references={key: config for key, config in whole.references.items() if key in references},
        )


def read_part(text: str) -> Part:
    """Read "I/N".

    Raises:
        ConfigError: it is not of that form, or I is not one of 1 to N.
    """
    match = _FORM.fullmatch(text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text!r}: it is I/N, the I-th of N shares of the trials; give e.g. 1/4")
    return Part(index=int(match[1]), count=int(match[2]))
