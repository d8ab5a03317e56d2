"""A trial slot as Ray Tune sees it: the trial runs in Tune's own process, or in workers that the process holds."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from hamu.errors import DataError
from hamu.storage.files import on_wait
from hamu.training.ray_workers import Workers, WorkersError
from hamu.training.stop import StopReason
from launch.nodes import gone_nodes
from launch.notices import Listener
from launch.results import SweepFolder
from launch.saves import SaveClock
from launch.shared import Shared
from launch.states import next_folder
from tune_spaces.schedulers import TIME, balance
from tune_spaces.search import BALANCE

if TYPE_CHECKING:
    from hamu.training.groups import Group
    from launch.slot import Slot

POINTER = "state.json"
"""In a checkpoint of Tune's: where the trial's state is. Tune's own folders are of one node, a worker may run on another."""

_TRIAL_ID, _STATE, _SAID = "trial_id", "state", "said"
_HELD_S = 60.0


class NodeDraining(RuntimeError):
    """The slot's node is to be taken away, or its process to end: its trial is saved, and goes on in another slot."""


class EndSignal:
    """SIGTERM to this process: noted while it has a trial, which is saved at the next look.

    Without a trial, and when it comes again, it does what Ray does with it: the process ends. Ray's own ways of stopping an actor
    (Tune's, `ray.kill`, the end of its driver) do not wait for a handler of this signal.

    Args:
        has_trial: whether there is something to save.
    """

    def __init__(self, has_trial: Callable[[], bool]) -> None:
        self.is_noted = False
        self._has_trial = has_trial
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # where Ray runs the methods of such an actor
            self._before = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._has_trial() and not self.is_noted:
            self.is_noted = True
        elif callable(self._before):
            self._before(number, frame)
        else:
            os._exit(128 + number)


def trial_config(trial_id: str, settings: Mapping[str, Any], *, is_stopped: bool = False) -> dict[str, Any]:
    """A trial's configuration as Tune has it.

    settings: in the place of the plan's; of a stopped trial, which is only completed, `state` too: a folder, or "" for the
    trial's own checkpoint.
    """
    assert is_stopped == (_STATE in settings), "a state is for a trial that was stopped"
    return {_TRIAL_ID: trial_id, **settings}


def overrides_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a configuration of Tune's that take the place of the plan's."""
    return {key: value for key, value in config.items() if key not in (_TRIAL_ID, _STATE) and value is not None}


def state_of(checkpoint: str | Path) -> str:
    """The folder of the state that a checkpoint of Tune's points to."""
    return json.loads((Path(checkpoint) / POINTER).read_text())["state"]


def said_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and short texts of a trial in what Tune was told of it last."""
    return json.loads(result.get(_SAID, "{}"))


def make_slot(shared: Shared, group: Group | None = None) -> Slot:
    """The slot of one worker of a group, or of a process that trains alone."""
    from launch.slot import Slot

    tell = Listener(shared.notices).tell
    on_wait(tell)  # for space, where the storage is full
    node = ray.get_runtime_context().get_node_id()
    if not SweepFolder(Path(shared.folder)).has_plan():  # of a node that came after the others were looked at
        raise DataError(
            f"node {ray.util.get_node_ip_address()} does not share {shared.folder}; mount it there as on the other nodes"
        )
    return Slot(shared, ray.get, group, node=node, gone=gone_nodes, say=tell)


class UnlearningTrial(tune.Trainable):
    """One trial after another in one process (`reuse_actors`): Tune says which, the slot runs it.

    The configuration holds the trial's id, and settings that a scheduler has put in the place of the plan's. After a scheduler
    has copied another trial's configuration the id is that trial's, so the trial is known by its name.
    """

    make_slot = staticmethod(make_slot)
    """Makes what runs the trials; in workers, once in each."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None, told: Sequence[str] = ()) -> None:
        """Start the process's slot; what is shared comes through `tune.with_parameters`.

        told: metrics that a scheduler or a stopper goes by. Tune keeps a history of each that it is told, so the others go to it
        in one text, which `said_of` reads.
        """
        assert shared is not None, "a trial needs what its sweep shares"
        self._told = (TIME, "status", "stop_reason", *told)
        self._folder = SweepFolder(Path(shared.folder))
        self._workers: Workers | None = None
        self._load_from: str | None = None
        self._has_begun = self._has_told_end = False
        self._listener = Listener(shared.notices)
        self._clock = SaveClock(shared.save_every_s)
        self._node: str = ray.get_runtime_context().get_node_id()
        self._nodes: set[str] = set()  # of the trial's workers
        self._n_workers_made = 0
        self._shared = shared
        self._expect(config, time.time())
        self._end_signal = EndSignal(lambda: self._has_begun)
        if shared.workers is None:
            self._slot = self.make_slot(shared)  # torch comes in here, and counts as the first trial's set-up
        else:
            self._start_workers()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the one at hand is left, and pruned if it was stopped."""
        self._leave()
        self._expect(new_config, time.time())
        return True

    def step(self) -> dict[str, Any]:
        """Train on to the next report.

        A trial that ended by HAMU's stopping criterion is ended by `StoppingCriterionStopper`, any other by `done`;
        asked once more, it is done too.
        """
        self._obey()
        metrics = self._begin()
        if not metrics.get("ended"):
            metrics = self._ask("prune") if self._is_stopped else self._ask("advance", saves=self._clock.is_due())
        self._nodes = set(metrics.pop("nodes", ()))
        if (save_s := metrics.pop("save_s", None)) is not None:
            self._clock.note(save_s)
        # Workers that took up a trial again have no evaluation to tell of yet; a scheduler goes by the last one.
        self._said |= metrics
        metrics = dict(self._said)
        if (score := balance(metrics)) is not None:
            metrics[BALANCE] = score
        has_ended = metrics.pop("ended")
        result: dict[str, Any] = {name: metrics[name] for name in self._told if name in metrics}
        result[_SAID] = json.dumps(metrics)
        if has_ended:
            result["done"] = self._has_told_end or metrics["stop_reason"] != StopReason.CRITERION.value
            self._has_told_end = True
        return result

    def cleanup(self) -> None:
        """Leave the trial at hand, and let the workers go."""
        with contextlib.suppress(WorkersError):
            self._leave()
        self._close_workers()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save the trial's state, for a pause of it or for another trial to go on from."""
        self._begin()
        folder = next_folder(self._folder.trial(self.trial_name))
        self._ask("save", folder=str(folder))
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps({"state": str(folder)}))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a saved state, of this trial or of another."""
        self._load_from = state_of(checkpoint)
        self._has_begun = False  # Tune restores a trial before its first step

    def _expect(self, config: dict[str, Any], asked_at: float) -> None:
        """Note the trial to begin at the next step: by then Tune has said which state it goes on from."""
        self._overrides = overrides_of(config)
        self._is_stopped = _STATE in config
        self._load_from = config.get(_STATE) or None
        self._asked_at = asked_at
        self._said: dict[str, Any] = {}
        self._has_begun = self._has_told_end = False

    def _begin(self) -> dict[str, Any]:
        if self._has_begun:
            return {}
        metrics = self._ask(
            "begin",
            trial_id=self.trial_name,
            overrides=self._overrides,
            load_from=self._load_from,
            started_at=self._asked_at,
        )
        self._has_begun = True
        self._clock.start()
        return metrics

    def _obey(self) -> None:
        """Do what the driver has asked for, if anything.

        Raises:
            NodeDraining: this process has to leave its node, or to end.
        """
        if self._end_signal.is_noted:
            self._hold()
            self._close_workers()
            raise NodeDraining("its process was told to end (SIGTERM)")
        notice = self._listener.heard()
        if notice.is_held:
            self._hold()
            self._listener.say_saved(self.trial_name)
            time.sleep(_HELD_S)  # the driver ends, and this process with it
            raise RuntimeError("the sweep was about to end, and did not")
        if self._node in notice.draining:
            self._hold()
            self._close_workers()
            raise NodeDraining(f"node {self._node} is to be taken away")
        if self._nodes & notice.draining.keys():
            self._hold()
            self._close_workers()
            self._start_workers()  # elsewhere: nothing new starts on a node that is to go

    def _hold(self) -> None:
        """Save the trial and leave it, to be begun again."""
        if self._has_begun:
            self._ask("hold")
            self._has_begun = False

    def _start_workers(self) -> None:
        shared = self._shared
        assert shared.workers is not None, "the trials are split"
        self._n_workers_made += 1
        name = f"slot-{self._node[:8]}-{os.getpid()}-{self._n_workers_made}"
        folder = f"{shared.scratch}/workers" if shared.scratch else Path(self.logdir).parent / "workers"
        make = functools.partial(self.make_slot, shared)
        self._workers, self._nodes = Workers(make, shared.workers, folder=folder, name=name), set()

    def _close_workers(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def _leave(self) -> None:
        if self._has_begun:
            self._ask("leave")
            self._has_begun = False

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        if self._workers is not None:
            return self._workers.ask(method, **arguments)
        return getattr(self._slot, method)(**arguments)
