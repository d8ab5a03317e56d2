"""A probe drops only trials that their own rule ends at their first step, and tells what others may ask for."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hamu.data.sources import ImageData
from hamu.models.record import json_text
from hamu.training.config import TrainConfig
from hamu.training.probe import ProbedPairs
from launch.machine import Machine, Slots
from launch.originals import Provided
from launch.probe import Probe, ProbedGroup, ProbedTrial, probe_plan, saved_text
from launch.references import References
from launch.shared import Original
from launch.signals import Signals
from launch.words import Words
from tests.launch.small_sweep import SmallSweep, run_to_end
from tune_spaces.space import Space

RATIOS = (0.05, 0.3, 0.6, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
SPACE = Space(
    name="digits/bounds",
    summary="ratios on both sides of the bounds",
    base={"dataset_name": "digits", "num_train_epochs": 0.3, "learning_rate": 0.01, "eval_strategy": "no"},
    grids=(
        {"unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": RATIOS, "stop_on_stopping_criterion": (True,)},
        {
            "unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": (0.5, 0.9, 1.0), "relative_constraint": (True,),
            "stop_on_stopping_criterion": (True,), "stopping_rule": ("feasible",), "hard_probability": (0.5,),
        },
        {
            "unlearning_method": ("hamu-q",), "constraint_ratio": (0.2, 0.99), "full_grad": (True,),
            "stop_on_stopping_criterion": (True,), "stopping_softness": (0.5,),
        },
        # These do not end there, whatever they ask for.
        {
            "unlearning_method": ("hamu-q",), "constraint_ratio": (0.99,), "continue_on_failed_feasibility": (True,),
            "stop_on_stopping_criterion": (False, True), "stopping_patience": (2,),
        },
        {"unlearning_method": ("ft",)},
    ),
)  # fmt: skip


def measured(sweep: SmallSweep, ray: Any, n_pairs: int = 3) -> Probe:
    """The probe of a small sweep, on a Ray that runs."""
    words, signals = Words(Console(file=io.StringIO())), Signals()
    references = References({}, path=sweep.folder.references_path, words=words, signals=signals)
    shared = sweep.shared_by(ray.put)
    return probe_plan(
        sweep.plan,
        sweep.ids,
        Provided(originals=shared.originals, failed={}, references=references),
        shared.data,
        slots=Slots(count=2),
        machine=Machine(cpus=2, cpu_name="a core", memory_bytes=2**34, gpus=0),
        words=words,
        signals=signals,
        n_pairs=n_pairs,
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_dropped_trial_takes_its_first_step_when_it_is_run_anyway(
    tmp_path: Path, digits: ImageData, original: Original, ray_cluster: Any
) -> None:
    sweep = SmallSweep(tmp_path, digits, original, space=SPACE)
    probe = measured(sweep, ray_cluster)
    configs = sweep.plan.configs
    of_method = {method: [i for i in probe.dropped if configs[i].method_name == method] for method in ("hamu-q", "hamu-u")}
    assert all(len(ids) >= 2 for ids in of_method.values()), probe.text()
    slot = sweep.slot()
    for trial_id in sweep.ids:
        run_to_end(slot, trial_id)
        row = sweep.row(trial_id)
        if trial_id in probe.dropped:
            assert row["steps"] == 0, trial_id
            assert row["stop_reason"] in ("stopping_criterion", "infeasible"), trial_id
            assert f"{sweep.plan.configs[trial_id].constraint_ratio:.4g}" in probe.dropped[trial_id]
        elif configs[trial_id].is_hamu and row["steps"] == 0:  # it is kept for a pair after its first that would let it pass
            (trial,) = [group.trials[trial_id] for group in probe.groups if trial_id in group.trials]
            assert trial.is_stopped[0] and not all(trial.is_stopped)
    stays = [i for i in sweep.ids if configs[i].method.continue_on_failed_feasibility]
    assert len(stays) == 2 and not set(stays) & set(probe.dropped)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trials_that_share_their_gradients_are_measured_once_and_all_of_it_is_told(
    tmp_path: Path, digits: ImageData, original: Original, ray_cluster: Any
) -> None:
    sweep = SmallSweep(tmp_path, digits, original, space=SPACE)
    probe = measured(sweep, ray_cluster, n_pairs=2)
    hamu = {trial_id for trial_id, config in sweep.plan.configs.items() if config.is_hamu}
    # rho 0 by block, rho 0 as one block, and rho 0.5 by block
    assert len(probe.groups) == 3
    of_groups = [trial_id for group in probe.groups for trial_id in group.trials]
    assert sorted(of_groups) == sorted(hamu)
    assert probe.seconds > 0 and not probe.failed
    text = probe.text()
    print(text)
    for group in probe.groups:
        pairs = group.pairs
        assert len(pairs) == 2
        assert f"{pairs.whole_kappa[1]:.3g}" in text
        for shown in (pairs.product[0], pairs.feasible_bound[0], pairs.aggregate_bound[1]):
            assert f"{shown:.4g}" in text
        assert (pairs.aggregate_bound <= pairs.feasible_bound + 1e-12).all()
    assert f"{len(probe.groups[0].pairs.blocks) - 8} others" in text
    assert all(trial_id in text for trial_id in probe.dropped)
    stored = json.loads(json_text(probe.to_json()))
    assert stored["dropped"] == dict(probe.dropped)
    assert stored["groups"][0]["gradient_product"] == pytest.approx(probe.groups[0].pairs.product.tolist())


@pytest.mark.ray
@pytest.mark.slow
def test_a_group_that_cannot_be_measured_is_named_and_its_trials_are_kept(
    tmp_path: Path, digits: ImageData, original: Original, ray_cluster: Any
) -> None:
    gone = Original(path=str(tmp_path / "gone"), arrays=original.arrays)
    sweep = SmallSweep(tmp_path, digits, gone, "constraint_ratio=0.99")
    probe = measured(sweep, ray_cluster)
    assert not probe.groups and not probe.dropped
    assert "gone" in next(iter(probe.failed.values()))
    assert "could not be measured" in probe.text()


def test_a_plan_without_constraints_needs_no_ray_to_be_probed(tmp_path: Path, digits: ImageData, original: Original) -> None:
    space = Space(name="digits/free", summary="no constraint", base={"dataset_name": "digits"}, grids=({"method": ("ft",)},))
    sweep = SmallSweep(tmp_path, digits, original, space=space)
    without_ray: Any = SimpleNamespace(put=lambda item: item)
    probe = measured(sweep, without_ray)
    assert not probe.dropped
    assert probe.text() == "nothing to measure: no trial has a constraint"
    assert saved_text(probe, []) == ""


def group_of(kappa: float, n_blocks: int = 10, bound: float | None = None) -> ProbedGroup:
    """Two pairs alike, of blocks with gradients of length 2 and 1 and this inner product; the last one has a third of S.

    bound: what a block adds to the feasible bound, as a share of its part of S."""
    shape = (2, n_blocks)
    retain, forget, cross = np.full(shape, 4.0), np.full(shape, 1.0), np.full(shape, kappa)
    retain[:, -1] *= ((n_blocks - 1) / 2) ** 2
    cross[:, -1] *= (n_blocks - 1) / 2
    product = np.sqrt(retain * forget).sum(axis=1)
    pairs = ProbedPairs(
        blocks=tuple(f"layer{index}.weight" for index in range(n_blocks)),
        retain=retain, forget=forget, cross=cross, loss_scale=1.0, clip=np.ones((2, 2)),
        product=product, aggregate_bound=product * np.sin(np.arccos(kappa / 2)), feasible_bound=product * 1.0,
        block_bounds=np.sqrt(retain * forget) * (1.0 if bound is None else bound),
    )  # fmt: skip
    config = TrainConfig.from_flat({"method": "hamu-q", "constraint_ratio": 0.5})
    trial = ProbedTrial(config=config, is_stopped=(False, False), largest=(1.0, 1.0), asked=0.5)
    return ProbedGroup(original="abcd1234", forget_set="forget_0_0.0", pairs=pairs, trials={"t0": trial})


def test_blocks_are_told_by_their_share_of_s_the_largest_first_and_the_rest_together() -> None:
    lines = Probe(groups=(group_of(-1.0),)).text().splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.strip().startswith("block")]
    first, last = lines[at + 1], lines[at + 9]
    assert re.search(r"layer9\.weight +33\.3% +-4\.5 +-4\.5 +-4\.5 +120\.0 +120\.0 +120\.0 +9 +9 +9$", first)
    assert re.search(r"2 others +14\.8% +-2 +-2 +-2 +120\.0 +120\.0 +120\.0 +4 +4 +4$", last)  # kappa < 0: the whole length


def test_the_bound_of_a_block_is_that_of_the_probe_and_its_angle_too() -> None:
    text = Probe(groups=(group_of(1.0, bound=0.5),)).text()
    assert re.search(r"layer9\.weight +33\.3% .* 60\.0 +60\.0 +60\.0 +4\.5 +4\.5 +4\.5$", text, flags=re.MULTILINE)
    # Of blocks together the angle is that of their gradients, one after the other.
    assert re.search(r"2 others +14\.8% .* 60\.0 +60\.0 +60\.0 +2 +2 +2$", text, flags=re.MULTILINE)


def row(trial_id: str, **columns: Any) -> dict[str, Any]:
    times = {"started_at": float(trial_id), "setup_s": 0.5, "train_s": 3.0, "steps_s": 1.0}
    return {"trial_id": trial_id, "status": "finished", "slot": 1, "steps": 10, "epochs": 3.0, **times, **columns}


def test_what_dropping_saved_is_told_by_the_median_trial_that_ran_its_process_not_counted() -> None:
    probe = Probe(dropped={"a": "", "b": "", "c": ""}, seconds=2.0)
    ran = [row("0", setup_s=100.0), row("1"), row("2"), row("3", setup_s=7.0), row("4", status="failed")]
    # Of the second one 0.5 + (3 - 1) / 4 evaluations + 1 / 10; the first of the slot counts as one with a set-up of no time.
    assert "3 trials dropped before they ran; measuring took 2.0 s, the trials would have taken about 3.3 s" in saved_text(
        probe, [*ran, {"status": "dropped", "started_at": None}]
    )
    assert saved_text(probe, [{"status": "dropped"}]).endswith("no trial ran that would tell what was saved")
