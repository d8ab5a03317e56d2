"""Searches over a pool of trials, played against made-up results."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest

from hamu.errors import ConfigError
from hamu.reports.views import View
from tests.benchmarks.search_player import play
from tune_spaces.ending_rules import NoGain
from tune_spaces.optuna_search import SAMPLERS, OptunaChooser
from tune_spaces.pool import Pool
from tune_spaces.pool_search import InOrder
from tune_spaces.search import SEARCHES, SearchSettings, make_search

PAPER = View("paper")


def made_up():
    """60 trials of two methods with a constraint and one without, and results of a smooth trade."""
    pool, rows = {}, {}
    settings = [
        {"unlearning_method": method, "learning_rate": lr, "constraint_ratio": ratio, "num_train_epochs": 7}
        for method in ("hamu-q", "hamu-u") for lr in (0.005, 0.01, 0.02, 0.04, 0.08) for ratio in (0.05, 0.1, 0.2, 0.4, 0.6)
    ]  # fmt: skip
    settings += [{"unlearning_method": "ft", "learning_rate": 0.001 * i, "num_train_epochs": 7} for i in range(1, 11)]
    for i, config in enumerate(settings):
        trial_id = f"{i:04d}-{config['unlearning_method']}"
        ratio = config.get("constraint_ratio", 0.0)
        dose = config["learning_rate"] * ratio * 400
        harm = 0.02 * (dose / 4) ** 2 + (0.05 * abs(math.log(config["learning_rate"] / 0.02)))
        forget = 5 * (1 - math.exp(-dose / 2))
        pool[trial_id] = config
        rows[trial_id] = {
            "status": "finished", "n_classes": 10, "forget_quality": forget, "retain_utility": -harm,
            "train_s": 1.0 + (i * 7 % 10),
            "forget_accuracy": math.exp(-forget), "retain_accuracy": 0.95 - harm / 5, "original_retain_accuracy": 0.95,
            "retrained_forget_accuracy": 0.02,
        }  # fmt: skip
    return pool, rows


POOL, ROWS = made_up()
BEST = {"target": ("forget_accuracy<=retrained",), "keep": ("retain_accuracy>=original-0.008",)}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("n_slots", [1, 3])
def test_a_search_runs_its_budget_of_different_trials(name, n_slots):
    ended, words = play(SearchSettings(name=name, trials=24, seed=1), POOL, ROWS, view=PAPER, n_slots=n_slots)
    assert len(ended) == len(set(ended)) == 24
    assert set(ended) <= set(POOL)
    assert words is None


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_runs_all_runs_each_once(name):
    ended, _ = play(SearchSettings(name=name, trials=60), POOL, ROWS, view=PAPER)
    assert sorted(ended) == sorted(POOL)


@pytest.mark.parametrize("more", [{"name": name} for name in ("random", "tpe", "nsga2")] + [BEST])
def test_a_search_is_the_same_for_a_seed_and_another_for_another(more):
    first, again, other = (play(SearchSettings(trials=12, seed=seed, **more), POOL, ROWS, view=PAPER)[0] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_grid_goes_in_order_and_random_does_not():
    assert play(SearchSettings(trials=5), POOL, ROWS, view=PAPER, n_slots=1)[0] == list(POOL)[:5]
    assert play(SearchSettings(name="random", trials=5), POOL, ROWS, view=PAPER, n_slots=1)[0] != list(POOL)[:5]


def test_default_budget_is_all_of_a_grid_and_half_of_what_others_choose_from():
    assert [SearchSettings(name=name).budget(60) for name in SEARCHES] == [60, 30, 30, 30]
    assert SearchSettings(name="tpe").budget(1) == 1
    assert SearchSettings(**BEST).budget(60) == 30
    assert SearchSettings(trials=99).budget(60) == 60


@pytest.mark.parametrize("more", [{"name": "tpe"}, {"name": "nsga2"}, BEST])
def test_the_first_trials_are_spread_over_methods_and_axes(more):
    search = make_search(SearchSettings(**more), POOL, view=PAPER)
    first = [search.propose() for _ in range(6)]
    assert {POOL[trial_id]["unlearning_method"] for trial_id in first} == {"hamu-q", "hamu-u", "ft"}
    rates = [POOL[trial_id]["learning_rate"] for trial_id in first]
    assert max(rates) / min(rates) >= 8


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_sampler_leaves_bad_regions_alone(name):
    """Where one method is worthless the sampler spends less than chance on it."""
    pool = {f"{method}{i}": {"unlearning_method": method, "lr": float(i)} for method in ("good", "bad") for i in range(30)}
    rows = {}
    for trial_id, config in pool.items():
        forgetting = 0.1 * config["lr"] if config["unlearning_method"] == "good" else -1.0
        rows[trial_id] = {"n_classes": 10, "forget_quality": forgetting, "retain_utility": -0.01 * config["lr"]}
    shares = []
    for seed in range(5):
        ended, _ = play(SearchSettings(name=name, trials=24, seed=seed), pool, rows, view=PAPER)
        shares.append(sum(trial_id.startswith("good") for trial_id in ended[8:]) / 16)
    assert sorted(shares)[2] > 0.6


@pytest.mark.parametrize("more", [{"name": "tpe"}, {"name": "nsga2"}, BEST])
def test_failed_and_pruned_trials_teach_nothing_and_are_not_run_again(more):
    rows = {trial_id: {**row, "status": ("failed", "pruned")[i % 2]} for i, (trial_id, row) in enumerate(ROWS.items())}
    ended, _ = play(SearchSettings(trials=60, **more), POOL, rows, view=PAPER)
    assert sorted(ended) == sorted(POOL)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_resumed_search_takes_the_trials_it_is_told_of_as_its_own(name):
    told, _ = play(SearchSettings(name=name, trials=10), POOL, ROWS, view=PAPER)
    search = make_search(SearchSettings(name=name, trials=24), POOL, view=PAPER)
    for trial_id in told:
        search.tell(trial_id, ROWS[trial_id])
        search.tell(trial_id, ROWS[trial_id])  # said twice, counted once
    rest = []
    while (trial_id := search.propose()) is not None:
        rest.append(trial_id)
        search.tell(trial_id, ROWS[trial_id])
    assert len(rest) == 14
    assert not set(rest) & set(told)


def test_dropped_trials_are_neither_proposed_nor_counted():
    search = make_search(SearchSettings(trials=4), POOL, view=PAPER)
    dropped = list(POOL)[:3]
    for trial_id in dropped:
        search.tell(trial_id, {"status": "dropped"})
    proposed = [search.propose() for _ in range(5)]
    assert proposed == [*list(POOL)[3:7], None]


def test_a_search_without_anything_that_differs_still_runs_its_trial():
    for name in SEARCHES:
        search = make_search(SearchSettings(name=name), {"only": {"learning_rate": 0.1}}, view=PAPER)
        assert (search.propose(), search.propose()) == ("only", None)


def test_no_gain_stops_after_its_trials_without_growth():
    flat = {trial_id: {**row, "forget_quality": 1.0 if i >= 3 else 0.2, "retain_utility": 0.0}
            for i, (trial_id, row) in enumerate(ROWS.items())}  # fmt: skip
    ended, words = play(SearchSettings(until="no-gain:5"), POOL, flat, view=PAPER, n_slots=1)
    assert len(ended) == 4 + 5  # the fourth trial is the last to add
    assert words == "the hypervolume (2.303, paper view) has not grown over 5 trials"


def test_a_gain_under_a_thousandth_is_none():
    rows = {trial_id: {**row, "forget_quality": 1.0 + 1e-5 * i, "retain_utility": 0.0}
            for i, (trial_id, row) in enumerate(ROWS.items())}  # fmt: skip
    assert len(play(SearchSettings(until="no-gain:5"), POOL, rows, view=PAPER, n_slots=1)[0]) == 6


def test_no_gain_never_stops_where_the_hypervolume_is_not_known():
    rows = {trial_id: {**row, "n_classes": None} for trial_id, row in ROWS.items()}
    assert len(play(SearchSettings(until="no-gain:3"), POOL, rows, view=PAPER)[0]) == 60


@pytest.mark.parametrize(
    "bad",
    [{"status": "failed"}, {"forget_quality": None, "retain_utility": None}, {"forget_quality": -0.1, "retain_utility": 0.0}],
)
def test_trials_that_failed_have_no_place_or_forgot_nothing_do_not_count_before_the_first_gain(bad):
    rule = NoGain(PAPER, 2)
    for i in range(9):
        rule.tell(f"none{i}", {**ROWS["0000-hamu-q"], **bad})
    assert rule.ended is None
    for i in range(3):
        assert rule.ended is None
        rule.tell(f"same{i}", ROWS["0000-hamu-q"])
    assert rule.ended is not None


def test_no_gain_is_the_same_when_a_sweep_is_resumed_after_failures():
    live, resumed = NoGain(PAPER, 3), NoGain(PAPER, 3)
    good = ROWS["0000-hamu-q"]
    for i, row in enumerate([good, {"status": "failed"}, good, {"status": "failed"}, good]):
        live.tell(str(i), row)
        if row is good:  # a failed trial is not told of again, as it is run again
            resumed.tell(str(i), row)
    assert (live.ended, resumed.ended) == (None, None)
    live.tell("last", good)
    resumed.tell("last", good)
    assert live.ended == resumed.ended
    assert live.ended is not None


def meets(row):
    return row["forget_accuracy"] <= 0.02 and row["retain_accuracy"] >= row["original_retain_accuracy"] - 0.008


@pytest.mark.parametrize("seed", range(3))
def test_target_search_stops_at_a_trial_that_meets_all(seed):
    assert sum(map(meets, ROWS.values())) == 4
    ended, words = play(SearchSettings(seed=seed, **BEST), POOL, ROWS, view=PAPER, n_slots=1)
    assert [meets(ROWS[trial_id]) for trial_id in ended] == [False] * (len(ended) - 1) + [True]
    assert len(ended) <= 30
    assert f"met by {ended[-1]} after {len(ended)} trials" in words


def test_of_several_that_meet_the_target_the_cheapest_is_the_answer():
    rows = {"a": (0.5, 3.0), "b": (0.01, 9.0), "c": (0.01, 4.0)}
    pool = {trial_id: {"learning_rate": rate} for trial_id, rate in zip(rows, (1.0, 2.0, 3.0), strict=True)}
    search = make_search(SearchSettings(target=("forget_accuracy<=0.02",), trials=3), pool, view=PAPER)
    assert sorted(search.propose() for _ in range(3)) == ["a", "b", "c"]
    for trial_id in ("a", "b"):
        search.tell(trial_id, {"status": "finished", "forget_accuracy": rows[trial_id][0], "train_s": rows[trial_id][1]})
    assert "met by b after 2 trials, 9 s of training" in search.ended
    search.tell("c", {"status": "finished", "forget_accuracy": 0.01, "train_s": 4.0})
    assert "met by c after 3 trials, 4 s of training" in search.ended


def test_a_target_that_no_trial_meets_says_how_near_it_came():
    search = SearchSettings(trials=12, target=("forget_accuracy<=0",), keep=("retain_accuracy>=original+0.5",))
    ended, words = play(search, POOL, ROWS, view=PAPER)
    assert len(ended) == 12
    assert "not met by 12 trials; nearest " in words
    assert "retain_accuracy>=original+0.5 missed by 0.5" in words


def test_a_target_whose_reference_is_missing_says_so():
    rows = {trial_id: {**row, "retrained_forget_accuracy": None} for trial_id, row in ROWS.items()}
    ended, words = play(SearchSettings(**BEST, trials=10), POOL, rows, view=PAPER)
    assert len(ended) == 10
    assert "the trial has no retrained_forget_accuracy" in words


def test_a_pruned_trial_does_not_meet_a_target():
    rows = {trial_id: {**row, "status": "pruned"} for trial_id, row in ROWS.items()}
    assert play(SearchSettings(**BEST), POOL, rows, view=PAPER)[1].endswith("none finished")


def test_settings_go_through_json():
    settings = SearchSettings(name="random", trials=3, until="no-gain:10", target=("forget_loss>=1",), keep=("retain_loss<=1",))
    assert SearchSettings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": "nsga"}, "did you mean 'nsga2'"),
        ({"trials": 0}, "trials is 0"),
        ({"until": "no-gain"}, "the rule is no-gain:N"),
        ({"until": "no-gain:0"}, "the rule is no-gain:N"),
        ({"scheduler": "ashaa"}, "did you mean 'asha'"),
        ({"score": "retain_acuracy"}, "did you mean 'retain_accuracy'"),
        ({"score": "-balance"}, "unknown score"),
        ({"keep": ("retain_loss<=1",)}, "goes with a target"),
        ({"target": ("forget_loss>>1",)}, "a condition is"),
        ({"name": "nsga2", "target": ("forget_loss>=1",)}, "a search of its own"),
    ],
)
def test_wrong_settings_are_refused_with_the_mend(wrong, words):
    with pytest.raises(ConfigError, match=words):
        SearchSettings(**wrong)


def test_each_name_has_a_sampler_of_its_own_and_one_that_is_not_known_has_none():
    made = {name: type(OptunaChooser(Pool(POOL), sampler=name, seed=1, view=PAPER)._study.sampler).__name__ for name in SAMPLERS}
    assert made == {"tpe": "TPESampler", "nsga2": "NSGAIISampler"}
    with pytest.raises(KeyError, match="cmaes"):
        OptunaChooser(Pool(POOL), sampler="cmaes", seed=1, view=PAPER)
    assert set(SAMPLERS) < set(SEARCHES)


def test_a_search_is_what_its_entry_makes(monkeypatch):
    """A new entry is run as it says; none falls through to that of another name."""
    backwards = InOrder(tuple(reversed(POOL)))
    monkeypatch.setitem(SEARCHES, "backwards", lambda settings, pool, view: backwards)
    ended, _ = play(SearchSettings(name="backwards", trials=3), POOL, ROWS, view=PAPER, n_slots=1)
    assert ended == list(POOL)[:-4:-1]


def test_a_missing_optuna_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'hamu-sweeps\[search\]'"):
        make_search(SearchSettings(name="tpe"), POOL, view=PAPER)
    assert make_search(SearchSettings(name="random"), POOL, view=PAPER).propose() in POOL


def test_a_pool_knows_the_order_of_numbers_and_not_of_names():
    pool = Pool(POOL)
    assert [axis.name for axis in pool.axes] == ["unlearning_method", "learning_rate", "constraint_ratio"]
    assert [axis.has_order for axis in pool.axes] == [False, True, True]
    assert pool.axes[2].values == (0.05, 0.1, 0.2, 0.4, 0.6)
    assert "constraint_ratio" not in pool.points["0055-ft"]
    here = pool.points["0000-hamu-q"]
    assert pool.distances(here)[:3].tolist() == [0.0, 0.25, 0.5]
    assert pool.nearest(here, list(POOL)[2:]) == "0005-hamu-q"
    assert pool.nearest({**pool.points["0055-ft"], "constraint_ratio": 4}, pool.ids) == "0055-ft"


def test_the_farthest_trial_is_where_none_ran_near():
    pool = Pool({str(i): {"learning_rate": float(i)} for i in range(9)})
    assert pool.farthest([str(i) for i in range(1, 9)]) == "8"
    assert pool.farthest([str(i) for i in range(1, 8)]) == "4"
    assert pool.farthest(["5", "6", "7"]) == "6"


def test_settings_of_any_kind_can_differ():
    pool = {"a": {"x": True, "y": ["p"], "z": None}, "b": {"x": False, "y": ["q"], "z": 3}, "c": {"x": True, "y": ["q"], "z": 5}}
    for name in SEARCHES:
        search = make_search(SearchSettings(name=name, trials=3), pool, view=PAPER)
        assert sorted(search.propose() for _ in range(3)) == ["a", "b", "c"]
