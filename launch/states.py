"""A trial's state in a folder of its own: what a paused trial goes on from, and what population based training hands from one
trial to another.

trials/<id>/states/<n>/state.pt      a checkpoint of the run
trials/<id>/states/<n>/origin.json   the trial and the recipe that it is of, and its numbers then
trials/<id>/taken.json               the state that the trial's own checkpoint was last replaced by, with its hash
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hamu.errors import CheckpointError
from hamu.storage import mount
from hamu.storage.files import CorruptError, read_json, replacing, write_json

STATE = "state.pt"
_KEPT = 4  # newest states of a trial; a scheduler asks for the last one of a trial, or for the one before


def next_folder(trial_folder: Path) -> Path:
    """A new folder for a trial's state; its oldest ones go."""
    states = trial_folder / "states"
    mount.fetch(states)
    found = sorted((int(path.name), path) for path in states.glob("[0-9]*") if path.name.isdigit())
    for _, path in found[: 1 - _KEPT]:
        with contextlib.suppress(OSError):
            mount.remove(path)
    folder = states / str(found[-1][0] + 1 if found else 0)
    folder.mkdir(parents=True)
    return folder


def write_origin(folder: Path, *, trial_id: str, recipe: str, metrics: Mapping[str, Any]) -> None:
    """Say which trial, run with which recipe, the state in a folder is of, and its numbers then."""
    write_json(folder / "origin.json", {"trial_id": trial_id, "recipe": recipe, "metrics": dict(metrics)})


def metrics_of(folder: Path) -> dict[str, Any]:
    """The numbers of a saved state's trial when it was saved."""
    return _read(folder / "origin.json").get("metrics", {})


def take_state(folder: Path, trial_folder: Path, *, trial_id: str, recipe: str) -> bool:
    """Put a saved state in the place of a trial's checkpoint.

    A trial that is begun again with the state that it was begun with (its process had died) keeps what it has saved since.

    Returns:
        Whether the checkpoint is now of another trial or recipe, so that it has to be adopted.

    Raises:
        CheckpointError: there is no state.
    """
    checkpoint, taken = trial_folder / "checkpoint.pt", trial_folder / "taken.json"
    state, origin = folder / STATE, _read(folder / "origin.json")
    before = _read(taken)
    is_foreign = (origin.get("trial_id"), origin.get("recipe")) != (trial_id, recipe)
    if before.get("state") == mount.shown(state) and before.get("recipe") == recipe and checkpoint.exists():
        return is_foreign and _content(checkpoint) == before.get("content")  # times of change are each machine's own
    if not state.exists():
        raise CheckpointError(f"no saved state in {mount.shown(folder)!r}; run the trial from its start: resume the sweep")
    with replacing(checkpoint) as temporary:
        shutil.copyfile(state, temporary)
    write_json(taken, {"state": mount.shown(state), "recipe": recipe, "content": _content(checkpoint)})
    return is_foreign


def drop_foreign_state(trial_folder: Path, *, recipe: str) -> None:
    """Remove a checkpoint that was taken for another recipe of the trial, which nobody asks for any more."""
    taken = _read(trial_folder / "taken.json")
    if taken and taken.get("recipe") != recipe:
        mount.remove(trial_folder / "checkpoint.pt")
        mount.remove(trial_folder / "taken.json")


def drop_states(trial_folder: Path) -> None:
    """Remove all saved states of a trial."""
    with contextlib.suppress(OSError):
        mount.remove(trial_folder / "states")
        mount.remove(trial_folder / "taken.json")


def _content(path: Path) -> dict[str, Any]:
    """What a file is known by on every machine."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, CorruptError):
        return {}
