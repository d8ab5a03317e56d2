"""A search that its trials give nothing to go by is refused before Ray starts, with what mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hamu.errors import ConfigError
from launch.plan import Plan, make_plan
from launch.search_checks import check_search
from tune_spaces.search import SearchSettings
from tune_spaces.space import Space, load_space

TEXTS: dict[str, Any] = {"modality": "llm", "dataset_name": "authors", "model_name": "tiny-llama", "num_train_epochs": 1}
IMAGES: dict[str, Any] = {"dataset_name": "digits", "num_train_epochs": 1}


def plan_of(root: Path, base: dict[str, Any], *, with_reference: bool = False, **search: Any) -> Plan:
    space = Space(name="x/y", summary="two", base=base, grids=({"unlearning_method": ("ft", "ga")},))
    return make_plan(
        space, name="x", overrides={}, root=root, with_reference=with_reference, search=SearchSettings(**search)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"name": "tpe"}, "--search tpe goes by the trials' metrics.*--set eval_at_ends=true, or leave out --search"),
        ({"name": "nsga2"}, "--search nsga2 goes by"),
        ({"until": "no-gain:3"}, "--until no-gain:3 goes by.*leave out --until"),
        ({"target": ("forget_accuracy<=0.1",)}, "--target 'forget_accuracy<=0.1' goes by.*leave out --target"),
        ({"name": "random", "until": "no-gain:3"}, "--until no-gain:3 goes by"),
    ],
)
def test_what_learns_from_results_is_refused_where_nothing_is_evaluated(
    tmp_path: Path, search: dict[str, Any], said: str
) -> None:
    timing = load_space("cifar/timing_all")
    with pytest.raises(ConfigError, match=said):
        check_search(make_plan(timing, name="x", overrides={}, root=tmp_path, search=SearchSettings(**search)))


@pytest.mark.parametrize("search", [{}, {"trials": 2}, {"name": "random", "trials": 2}])
def test_an_order_that_goes_by_no_result_is_not_refused(tmp_path: Path, search: dict[str, Any]) -> None:
    timing = load_space("cifar/timing_all")
    check_search(make_plan(timing, name="x", overrides={}, root=tmp_path, search=SearchSettings(**search)))


@pytest.mark.parametrize(
    ("base", "search", "said"),
    [
        (TEXTS, {"target": ("forget_rouge<=0.2",)}, "--target 'forget_rouge<=0.2'.*add --set eval_generation_rows=20"),
        (TEXTS, {"target": ("tofu_forget_probability<=0.2",)}, "add --set eval_tofu=true, or"),
        (TEXTS, {"target": ("tofu_retain_rouge>=0.2",)}, "add --set eval_tofu=true --set eval_generation_rows=20, or"),
        (TEXTS | {"eval_tofu": True}, {"target": ("tofu_model_utility>=0.2",)}, "add --set eval_generation_rows=20, or"),
        (TEXTS | {"eval_tofu": True}, {"target": ("tofu_forget_quality>=0.2",)}, "add --with-reference, or"),
        (
            TEXTS,
            {"target": ("forget_loss>=1",), "keep": ("retain_loss<=1", "retain_rouge>=0.5")},
            "--keep 'retain_loss<=1,retain_rouge>=0.5': the trials do not measure retain_rouge",
        ),
        (IMAGES, {"target": ("forget_rouge<=0.2",)}, "a metric of texts, and the trials are of images"),
        (IMAGES | {"eval_strategy": "epoch"}, {"scheduler": "asha", "score": "forget_rouge"}, "measured at a trial's end alone"),
        (TEXTS | {"eval_tofu": True}, {"scheduler": "asha", "score": "-tofu_forget_quality"}, "'-tofu_forget_quality': it goes"),
    ],
)  # fmt: skip
def test_a_metric_that_the_trials_do_not_measure_is_refused_with_what_measures_it(
    tmp_path: Path, base: dict[str, Any], search: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_search(plan_of(tmp_path, base, **search))


def test_what_the_trials_measure_is_accepted(tmp_path: Path) -> None:
    measured = TEXTS | {"eval_tofu": True, "eval_generation_rows": 4}
    for metric in ("forget_rouge", "tofu_forget_rouge", "tofu_model_utility", "tofu_forget_quality", "forget_loss"):
        check_search(plan_of(tmp_path, measured, with_reference=True, target=(f"{metric}>=0.1",)))
    check_search(plan_of(tmp_path, IMAGES, target=("forget_accuracy<=0.1",), keep=("retain_accuracy>=original-0.1",)))
    check_search(plan_of(tmp_path, IMAGES, scheduler="asha", score="-forget_accuracy"))
    check_search(plan_of(tmp_path, IMAGES, name="tpe", until="no-gain:3"))


def test_a_search_that_needs_optuna_is_refused_without_it_and_does_not_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("tpe", "nsga2"):
        with pytest.raises(ConfigError, match=r"need optuna, which is not installed; run: pip install 'hamu-sweeps\[search\]'"):
            check_search(plan_of(tmp_path, IMAGES, name=name))
    check_search(plan_of(tmp_path, IMAGES, name="random"))
    code = (
        "import sys; from launch.sweep import main; "
        f"assert main(['--dry-run', '--search', 'tpe', '--storage-path', {str(tmp_path)!r}]) == 0; "
        "assert not {'optuna', 'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
