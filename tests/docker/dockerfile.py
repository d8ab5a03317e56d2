"""Reads a Dockerfile: its stages and instructions, and what a build would copy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

_FLAG = re.compile(r"--[a-z-]+(=\S+)?\s+")


@dataclass(frozen=True)
class Instruction:
    """name: upper case. value: its text in one line; for RUN and COPY without the flags, which stand in `flags`."""

    name: str
    value: str
    flags: tuple[str, ...] = ()


@dataclass
class Stage:
    """image: of its FROM. name: of its AS, or ""."""

    image: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]

    def settings(self, *names: str) -> dict[str, str]:
        """Values of its ENV and ARG instructions (or of those of `names`), quotes removed."""
        found: dict[str, str] = {}
        for each in self.instructions:
            if each.name in (names or ("ENV", "ARG")):
                pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', each.value)
                found.update({key: value.strip('"') for key, value in pairs})
        return found


def read_dockerfile(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, from the first to the last."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(str.strip, text.splitlines()):
        name, _, value = line.strip().partition(" ")
        value, flags = value.strip(), []
        if name == "FROM":
            image, _, alias = value.partition(" AS ")
            stages.append(Stage(image.strip(), alias.strip()))
            continue
        while name in ("RUN", "COPY", "HEALTHCHECK") and (match := _FLAG.match(value)):
            flags.append(match[0].strip())
            value = value[match.end() :]
        stages[-1].instructions.append(Instruction(name, value, tuple(flags)))
    return stages


def expanded(text: str, settings: Mapping[str, str]) -> str:
    """The text with $NAME and ${NAME} replaced; an unknown name is an error."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: settings[match[1]], text)


def is_sent(path: str, dockerignore: str) -> bool:
    """Whether a build is sent the file or folder `path` (relative): the last rule that fits it, or a folder above it, decides."""
    sent = True
    for rule in (line.strip() for line in dockerignore.splitlines()):
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.lstrip("!")
        above = [path, *(str(each) for each in Path(path).parents if str(each) != ".")]
        patterns = (pattern, pattern.removeprefix("**/"))
        names = [*above, *(Path(each).name for each in above)] if pattern.startswith("**/") else above
        if any(fnmatch(each, one) for each in names for one in patterns):
            sent = rule.startswith("!")
    return sent
