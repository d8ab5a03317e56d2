"""What ended trials have left is checked: what is broken is named and set aside, and its trial runs again.

A disk that was cut off from power, a file truncated by hand or a copy that was interrupted leaves files that are there and wrong.
Every file that a trial leaves can tell (hamu/storage): its row and its records by a checksum, its weights by the size that their
header says. Unfinished trials are none of this: a slot that finds a broken checkpoint or record begins its trial anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hamu.errors import CorruptError
from hamu.storage import mount
from hamu.storage.files import read_json, set_aside
from hamu.storage.parquet import check_parquet
from hamu.storage.weights import check_weights
from launch.plan import Plan
from launch.results import SweepFolder
from launch.standing import has_ended

_N_THREADS = 8  # a file of a network folder or a store takes its time, which is not this machine's


def repair(folder: SweepFolder, plan: Plan, say: Callable[[str], None]) -> list[str]:
    """Check the files of the trials that ended, set aside what is broken, and have those trials run again.

    A thousand trials on a local disk take well under a second.

    Args:
        folder: of the sweep, whose lease is held.
        plan: whose trials are looked at.
        say: told what is broken, a line each.

    Returns:
        Ids of the trials that have to run again, in the order of the plan.
    """
    _repair_own(folder, say)
    trials = [trial.trial_id for trial in plan.trials]
    mount.fetch(folder.records)
    # The row says what to look for, so it is fetched first; of a model its weights are large, and only their sizes are looked at.
    mount.fetch(folder.trials, only=lambda name: name.endswith("/row.json"))
    with ThreadPoolExecutor(_N_THREADS) as pool:
        found = pool.map(lambda trial_id: list(_broken(folder, trial_id)), trials)
        broken = {trial_id: errors for trial_id, errors in zip(trials, found, strict=True) if errors}
    for trial_id, errors in broken.items():
        model = folder.trial(trial_id) / "model"
        for error in errors:
            # All of a model: what the rerun saves takes the place of its whole folder, with whatever lies in there.
            broken_one = model if error.path.is_relative_to(model) else error.path
            aside = set_aside(broken_one) if broken_one.exists() else None
            where = "" if aside is None else f", set aside as {aside.name}"
            say(f"trial {trial_id} runs again: {mount.shown(error.path)} is broken ({error.why}){where}")
        mount.remove(folder.trial(trial_id) / "row.json")
    return list(broken)


def _repair_own(folder: SweepFolder, say: Callable[[str], None]) -> None:
    """Set aside files of the sweep itself that it can make again; its plan is not one of them."""
    again = (folder.originals, folder.references_path, folder.search_path, folder.probe_path, folder.summary)
    for path in (*again, *folder.path.glob("runs*.json")):
        mount.fetch(path)
        try:
            read_json(path)
        except FileNotFoundError:
            continue
        except CorruptError as error:
            say(f"{mount.shown(path)} is broken ({error.why}), set aside as {set_aside(path).name}; it is made again")


def _broken(folder: SweepFolder, trial_id: str) -> Iterator[CorruptError]:
    """What is wrong with an ended trial; nothing of one that has not ended."""
    try:
        row = read_json(folder.trial(trial_id) / "row.json")
    except (FileNotFoundError, NotADirectoryError):
        return
    except CorruptError as error:
        yield error
        return
    if not has_ended(row) or row.get("status") == "dropped":
        return
    records = folder.records / f"{trial_id}.parquet"
    try:
        check_parquet(records)
    except FileNotFoundError:
        pass  # as below
    except CorruptError as error:
        yield error
    yield from _broken_weights(folder.trial(trial_id) / "model")


def _broken_weights(model: Path) -> Iterator[CorruptError]:
    """What is wrong with a model's weights, by their sizes: their content would take as long to read as it took to write.

    Files that are not there are not broken: models are removed to make space, and the trial's numbers are in its row.
    """
    if mount.store_of(model) is not None:  # whose objects are whole or not there
        return
    for path in sorted(model.rglob("*.safetensors")):
        try:
            check_weights(path)
        except CorruptError as error:
            yield error
