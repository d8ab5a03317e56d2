"""A space lists its trials, each once, with ids that do not change; overrides change exactly what they name."""

from __future__ import annotations

import pytest

from hamu.errors import ConfigError
from tune_spaces.space import Space, find_space

NAMES = ("cifar/constraint_sweep", "cifar/rho_sweep", "digits/quickstart")


def space(**changes: object) -> Space:
    settings: dict = {
        "name": "task/sweep",
        "summary": "two kinds of method",
        "base": {"seed": 1},
        "grids": (
            {"unlearning_method": ("hamu-q", "hamu-u"), "constraint_ratio": (0.1, 0.2), "learning_rate": (0.1,)},
            {"unlearning_method": ("ft", "ga"), "learning_rate": (0.1, 0.2)},
        ),
    }
    return Space(**{**settings, **changes})


def values(of: Space, key: str) -> list[object]:
    return [trial.config.get(key) for trial in of.trials()]


def test_trials_are_the_union_of_the_products_in_order() -> None:
    assert values(space(), "unlearning_method") == ["hamu-q"] * 2 + ["hamu-u"] * 2 + ["ft"] * 2 + ["ga"] * 2
    assert values(space(), "constraint_ratio") == [0.1, 0.2, 0.1, 0.2, None, None, None, None]
    assert set(values(space(), "seed")) == {1}


def test_a_setting_in_two_grids_is_one_trial() -> None:
    twice = space(grids=({"unlearning_method": ("ft",)}, {"unlearning_method": ("ft", "ga")}))
    assert values(twice, "unlearning_method") == ["ft", "ga"]


def test_ids_are_stable_and_tell_settings_apart_but_not_places() -> None:
    ids = [trial.trial_id for trial in space().trials()]
    assert ids == [trial.trial_id for trial in space().trials()]
    assert len({name.rsplit("-", 1)[1] for name in ids}) == len(ids) == 8
    assert ids == [trial.trial_id for trial in space(base={"seed": 1, "artifact_root": "/elsewhere"}).trials()]
    assert ids != [trial.trial_id for trial in space(base={"seed": 2}).trials()]
    assert ids[0].startswith("0000-hamu-q-")


def test_an_override_replaces_the_axis_where_there_is_one() -> None:
    changed = space().with_overrides({"constraint_ratio": (0.5,), "learning_rate": (1.0, 2.0)})
    assert len(changed.trials()) == 8
    assert set(values(changed, "constraint_ratio")) == {0.5, None}
    assert set(values(changed, "learning_rate")) == {1.0, 2.0}


def test_an_override_of_another_flag_is_for_all_trials_and_an_axis_if_it_has_values() -> None:
    assert set(values(space().with_overrides({"seed": (7,)}), "seed")) == {7}
    assert len(space().with_overrides({"forget_class": (0, 1, 2)}).trials()) == 24


def test_methods_are_chosen_among_the_grids_and_new_ones_join_their_kind() -> None:
    assert values(space().with_overrides({"unlearning_method": ("hamu-u",)}), "constraint_ratio") == [0.1, 0.2]
    assert values(space().with_overrides({"unlearning_method": ("ga",)}), "learning_rate") == [0.1, 0.2]
    joined = space().with_overrides({"unlearning_method": ("kl", "hamu-q")})
    assert values(joined, "unlearning_method") == ["hamu-q", "hamu-q", "kl", "kl"]


def test_the_original_has_its_own_overrides() -> None:
    changed = space().with_overrides({"original.num_train_epochs": (3,)})
    assert changed.original == {"num_train_epochs": 3}
    assert changed.trials() == space().trials()
    with pytest.raises(ConfigError, match="the original takes one value"):
        space().with_overrides({"original.seed": (1, 2)})


def test_a_space_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="'<task>/<sweep>'"):
        space(name="sweep")
    with pytest.raises(ConfigError, match="axis 'seed' must be a tuple"):
        space(grids=({"seed": [1, 2]},))
    with pytest.raises(ConfigError, match="has no grids"):
        space(grids=())


@pytest.mark.parametrize(
    ("name", "task", "found"),
    [
        ("digits/quickstart", None, "digits/quickstart"),
        ("quickstart", None, "digits/quickstart"),
        ("rho-sweep", "cifar", "cifar/rho_sweep"),
        (None, "digits", "digits/quickstart"),
    ],
)
def test_a_space_is_found_by_its_name_or_task(name: str | None, task: str | None, found: str) -> None:
    assert find_space(name, task, names=NAMES) == found


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("digits/quickstrat", None, "did you mean 'digits/quickstart'"),
        ("quickstart", "cifar", "unknown space 'quickstart'"),
        (None, "cifar", "2 spaces fit; choose one with --space: cifar/constraint_sweep, cifar/rho_sweep"),
        (None, "text", "unknown task 'text'"),
    ],
)
def test_a_space_that_is_not_there_is_refused_with_the_known_ones(name: str | None, task: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_space(name, task, names=NAMES)
