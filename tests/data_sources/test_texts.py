"""Texts: which rows the settings name in each layout, what is refused, and what becomes of rows that do not fit."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hamu.data.texts import (
    TextRows,
    check_text_inputs,
    duplicate_suffix,
    forget_group,
    load_text_data,
    resolve_sources,
    sha256_texts,
    text_task_name,
)
from hamu.errors import ConfigError, DataError
from hamu.training.config import DataConfig

N_FULL = 100


def row(number: int, word: str = "a") -> dict[str, Any]:
    return {"question": f"q {number}", "answer": f"{word} {number}"}


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(json.dumps(one) for one in rows))
    return file


def write_tofu(folder: Path) -> Path:
    """The layout of TOFU: the file names are the subsets; forgetNN is the tail of full, and retainNN its head."""
    full = [row(number) for number in range(N_FULL)]
    write(folder / "full.json", full)
    for share in (1, 5, 10):
        cut = N_FULL - share
        write(folder / f"retain{cut:02d}.json", full[:cut])
        write(folder / f"forget{share:02d}.json", full[cut:])
        write(folder / f"holdout{share:02d}.json", [row(number) for number in range(200, 200 + share)])
        write(folder / f"forget{share:02d}_perturbed.json", [perturbed(number) for number in range(cut, N_FULL)])
    write(folder / "retain_perturbed.json", [perturbed(number) for number in range(10)])
    for name in ("real_authors", "world_facts"):
        write(folder / f"{name}.json", [row(number) for number in range(4)])
        rows = [row(number) | {"perturbed_answer": ["no", "never", "not"]} for number in range(4)]
        write(folder / f"{name}_perturbed.json", rows)
    (folder / "idontknow.jsonl").write_text("I don't know.\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: full\n  data_files: full.json\n---\n")
    return folder


def perturbed(number: int) -> dict[str, Any]:
    return row(number) | {
        "paraphrased_question": f"which {number}", "paraphrased_answer": f"p {number}",
        "perturbed_answer": [f"wrong {number} {k}" for k in range(5)],
    }  # fmt: skip


def write_waterdrum(folder: Path) -> Path:
    """The layout of WaterDrum-TOFU: a folder for each subset, deeper inside, with a file for each split."""
    full = [row(number) for number in range(N_FULL)]
    for share in (1, 5, 10):
        cut = N_FULL - share
        parts = {"full": full, "retain": full[:cut], "forget": full[cut:]}
        if share == 10:
            parts["exact_duplicate"] = full[cut:]
            parts["semantic_duplicate"] = [row(number, "again") for number in range(cut, N_FULL)]
        for split, rows in parts.items():
            write(folder / "parquet" / f"forget_{share:02d}" / f"{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("data") / "tofu")


@pytest.fixture(scope="module")
def waterdrum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_waterdrum(tmp_path_factory.mktemp("data") / "duplicates")


def config(name: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(dataset_name=str(name), **settings)


def subsets(name: Path | str, **settings: Any) -> list[str | None]:
    """Retain, forget and test subsets."""
    sources = resolve_sources(config(name, **settings))
    return [sources[part].subset if part in sources else None for part in ("retain", "forget", "test")]


TOFU_RULES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["retain90", "forget10", "holdout10"]),
    ({"forget_dataset_subset": "forget05"}, ["retain95", "forget05", "holdout05"]),
    ({"dataset_subset": "retain95"}, ["retain95", "forget05", "holdout05"]),
    ({"dataset_subset": "retain99"}, ["retain99", "forget01", "holdout01"]),
    ({"dataset_subset": "forget05"}, ["retain95", "forget05", "holdout05"]),
    ({"forget_pct": 1}, ["retain99", "forget01", "holdout01"]),
    ({"dataset_subset": "retain90", "forget_dataset_subset": "forget05"}, ["retain90", "forget05", "holdout05"]),
    ({"dataset_subset": "full", "add_forget_to_train": True}, ["retain90", "forget10", "holdout10"]),
    ({"test_dataset_subset": "holdout01"}, ["retain90", "forget10", "holdout01"]),
    ({"test_dataset_subset": "world_facts"}, ["retain90", "forget10", "world_facts"]),
]


@pytest.mark.parametrize(("settings", "expected"), TOFU_RULES)
def test_tofu_subsets_follow_from_each_other(tofu: Path, settings: dict[str, Any], expected: list[str]) -> None:
    for name in (tofu, "tofu", "locuslab/TOFU", "someone/tofu"):
        assert subsets(name, **settings) == expected
    check_text_inputs(config(tofu, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_subset": "retain99", "forget_dataset_subset": "forget05"}, "'retain99' holds rows of .*'forget05'"),
        ({"dataset_subset": "forget10", "forget_dataset_subset": "forget05"}, "'forget10' holds rows of .*'forget05'"),
        ({"dataset_subset": "forget05", "forget_dataset_subset": "forget05"}, "retain and to forget are the same"),
        ({"dataset_subset": "full"}, "'full' holds the rows to forget; .* --add_forget_to_train"),
        ({"dataset_subset": "world_facts"}, "'world_facts' does not say which rows to forget"),
        ({"forget_dataset_subset": "world_facts"}, "'world_facts' does not say which rows to retain"),
        ({"forget_dataset_subset": "full"}, "'full' does not say which rows to retain"),
        ({"forget_dataset_subset": "forget05", "forget_pct": 10}, r"forget_pct 10 \('forget10'\) differ"),
        ({"add_duplicate_to_retain": True}, "which rows .* are duplicates is not said"),
    ],
)
def test_tofu_contradictions_are_refused(tofu: Path, settings: dict[str, Any], message: str) -> None:
    for name in (tofu, "tofu"):
        with pytest.raises(ConfigError, match=message) as error:
            check_text_inputs(config(name, **settings))
        assert "\n" not in str(error.value)


def test_tofu_rows_are_those_of_its_files(tofu: Path) -> None:
    data = load_text_data(config(tofu, forget_pct=5))
    assert data.retain.prompts == tuple(f"q {number}" for number in range(95))
    assert data.forget.responses == tuple(f"a {number}" for number in range(95, 100))
    assert data.test.responses == tuple(f"a {number}" for number in range(200, 205))
    assert data.provenance["forget"]["files"] == ["forget05.json"]
    assert data.provenance["forget"]["columns"] == ["question", "answer"]
    counts = {name: data.provenance[name] for name in data.provenance if name.startswith("n_")}
    assert counts == {
        "n_retain": 95, "n_forget": 5, "n_test": 5, "n_duplicates": 0, "n_empty": 0, "n_forget_in_retain": 0,
    }  # fmt: skip
    assert data.perturbed == {}


def test_a_tofu_folder_without_a_holdout_has_no_test_rows(tmp_path: Path) -> None:
    folder = write_tofu(tmp_path / "tofu")
    (folder / "holdout05.json").unlink()
    assert subsets(folder, forget_pct=5) == ["retain95", "forget05", None]
    assert len(load_text_data(config(folder, forget_pct=5)).test) == 0
    with pytest.raises(DataError, match="no subset 'holdout05'; .* its files are: .*holdout10"):
        check_text_inputs(config(folder, forget_pct=5, test_dataset_subset="holdout05"))


def test_perturbed_rows_of_tofu_are_those_of_the_forget_subset(tofu: Path) -> None:
    settings = config(tofu, forget_pct=5)
    check_text_inputs(settings, with_perturbed=True)
    data = load_text_data(settings, with_perturbed=True)
    assert {part: len(rows) for part, rows in data.perturbed.items()} == {
        "forget": 5, "retain": 10, "real_authors": 4, "world_facts": 4,
    }  # fmt: skip
    forget = data.perturbed["forget"]
    assert (forget.questions[0], forget.answers[0], forget.paraphrased[0]) == ("q 95", "a 95", "p 95")
    assert forget.perturbed[0] == tuple(f"wrong 95 {k}" for k in range(5))
    facts = data.perturbed["world_facts"]
    assert facts.paraphrased == facts.answers
    assert facts.perturbed[0] == ("no", "never", "not")
    assert data.sha256 == load_text_data(settings).sha256
    assert data.n_bytes > load_text_data(settings).n_bytes


def test_missing_perturbed_files_are_named(tmp_path: Path, waterdrum: Path) -> None:
    folder = write_tofu(tmp_path / "tofu")
    write(folder / "world_facts_perturbed.json", [row(0) | {"perturbed_answer": []}])
    with pytest.raises(DataError, match="lacks a question, an answer or a wrong answer in row 0"):
        load_text_data(config(folder), with_perturbed=True)
    (folder / "world_facts_perturbed.json").unlink()
    for call in (load_text_data, check_text_inputs):
        with pytest.raises(DataError, match=r"eval_tofu needs the perturbed answers of .*world_facts_perturbed"):
            call(config(folder), with_perturbed=True)
        with pytest.raises(DataError, match=r"no perturbed answers, which eval_tofu needs.*retain_perturbed\.json"):
            call(config(waterdrum), with_perturbed=True)


def test_waterdrum_subsets_hold_retain_and_forget(waterdrum: Path) -> None:
    assert subsets(waterdrum) == subsets("waterdrum_tofu") == ["forget_10", "forget_10", None]
    assert subsets("Glow-AI/WaterDrum-TOFU", forget_pct=5) == ["forget_05", "forget_05", None]
    for settings in ({"dataset_subset": "forget_05"}, {"forget_dataset_subset": "forget_05"}, {"forget_pct": 5}):
        data = load_text_data(config(waterdrum, **settings))
        assert (len(data.retain), len(data.forget), len(data.test)) == (95, 5, 0)
        assert forget_group(config(waterdrum, **settings)) == "forget_05"
    assert len(load_text_data(config(waterdrum, test_dataset_split="full")).test) == N_FULL
    assert len(load_text_data(config(waterdrum, dataset_subset="forget_10", forget_dataset_subset="forget_05")).forget) == 5
    with pytest.raises(ConfigError, match="'forget_05' hold rows of forget_dataset_subset 'forget_10'"):
        resolve_sources(config(waterdrum, dataset_subset="forget_05", forget_dataset_subset="forget_10"))
    with pytest.raises(ConfigError, match="'full' holds the rows to forget"):
        resolve_sources(config(waterdrum, dataset_split="full"))
    with pytest.raises(ConfigError, match="are the same"):
        resolve_sources(config(waterdrum, dataset_split="forget"))


def test_duplicates_are_added_to_the_retain_rows_on_request(waterdrum: Path) -> None:
    plain = config(waterdrum, duplicate_dataset_split="exact_duplicate")
    assert "duplicate" not in resolve_sources(plain)
    assert duplicate_suffix(plain) == ""
    semantic = config(waterdrum, add_duplicate_to_retain=True)
    data = load_text_data(semantic)
    assert len(data.retain) == 100 and data.provenance["n_duplicates"] == 10
    assert data.retain.responses[90:] == tuple(f"again {number}" for number in range(90, 100))
    assert duplicate_suffix(semantic) == "_semanticdup"
    exact = config(waterdrum, add_duplicate_to_retain=True, duplicate_dataset_split="exact_duplicate")
    assert load_text_data(exact).retain.responses[90:] == data.forget.responses
    assert duplicate_suffix(exact) == "_exactdup"
    own = config(waterdrum, add_duplicate_to_retain=True, duplicate_dataset_subset="forget_05", duplicate_dataset_split="forget")
    assert duplicate_suffix(own) == "_duplicate"
    assert len(load_text_data(own).retain) == 95
    with pytest.raises(DataError, match="no split 'semantic_duplicate'; it has: forget, full, retain"):
        check_text_inputs(config(waterdrum, add_duplicate_to_retain=True, forget_pct=5))


def test_own_rows_to_forget_must_be_named(tmp_path: Path) -> None:
    keep = write(tmp_path / "keep.jsonl", [row(number) for number in range(4)])
    drop = write(tmp_path / "drop.parquet", [row(number) for number in range(4, 6)])
    check = write(tmp_path / "check.json", [row(9)])
    with pytest.raises(ConfigError, match="which rows of dataset .* are to be forgotten is not said"):
        resolve_sources(config(keep))
    with pytest.raises(ConfigError, match="are the same"):
        resolve_sources(config(keep, forget_dataset_name=str(tmp_path / "." / "keep.jsonl")))
    with pytest.raises(ConfigError, match="forget_pct 5 is for TOFU"):
        resolve_sources(config(keep, forget_dataset_name=str(drop), forget_pct=5))
    settings = config(keep, forget_dataset_name=str(drop), test_dataset_name=str(check))
    data = load_text_data(settings)
    assert (len(data.retain), len(data.forget), len(data.test)) == (4, 2, 1)
    assert (text_task_name(settings), forget_group(settings)) == ("keep", "drop")
    assert "test" not in resolve_sources(config(keep, forget_dataset_name=str(drop)))


def test_own_folder_by_splits_and_by_subsets(tmp_path: Path) -> None:
    splits = tmp_path / "my set"
    write(splits / "data" / "retain.parquet", [row(number) for number in range(3)])
    write(splits / "data" / "forget.parquet", [row(7)])
    write(splits / "data" / "dup.parquet", [row(8)])
    settings = config(
        splits, dataset_split="retain", forget_dataset_split="forget", add_duplicate_to_retain=True, duplicate_dataset_split="dup"
    )
    data = load_text_data(settings)
    assert (len(data.retain), len(data.forget), data.provenance["n_duplicates"]) == (4, 1, 1)
    assert (text_task_name(settings), forget_group(settings), duplicate_suffix(settings)) == ("my_set", "forget", "_duplicate")
    saved = tmp_path / "saved"
    for name, numbers in (("keep", range(3)), ("drop", range(3, 5))):
        datasets.Dataset.from_list([row(number) for number in numbers]).save_to_disk(saved / name)
    write(saved / "more.jsonl", [row(9)])
    settings = config(saved, dataset_subset="keep", forget_dataset_subset="drop", test_dataset_subset="more")
    data = load_text_data(settings)
    assert (len(data.retain), len(data.forget), len(data.test)) == (3, 2, 1)
    assert forget_group(settings) == "drop"


def test_own_forget_rows_beside_tofu_follow_no_rule_of_tofu(tofu: Path, tmp_path: Path) -> None:
    drop = write(tmp_path / "drop.jsonl", [row(900)])
    data = load_text_data(config(tofu, dataset_subset="full", forget_dataset_name=str(drop)))
    assert (len(data.retain), len(data.forget), len(data.test)) == (N_FULL, 1, 0)


@pytest.mark.parametrize(
    ("one", "prompt", "response"),
    [
        ({"question": "q", "answer": "a", "text": "t"}, "q", "a"),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"instruction": "q", "output": "a", "text": "t"}, "q", "a"),
        ({"input": "q", "response": "a"}, "q", "a"),
        ({"text": "t"}, "", "t"),
        ({"title": "x", "text": "t"}, "", "t"),
    ],
)
def test_usual_columns_are_found(tmp_path: Path, one: dict[str, str], prompt: str, response: str) -> None:
    keep = write(tmp_path / "keep.jsonl", [one])
    drop = write(tmp_path / "drop.jsonl", [{name: text + "2" for name, text in one.items()}])
    data = load_text_data(config(keep, forget_dataset_name=str(drop)))
    assert (data.retain.prompts, data.retain.responses) == ((prompt,), (response,))


def test_columns_can_be_named_and_missing_ones_name_those_there_are(tmp_path: Path) -> None:
    keep = write(tmp_path / "keep.jsonl", [{"ask": "q", "say": "a", "question": "other"}])
    drop = write(tmp_path / "drop.jsonl", [{"frage": "f", "antwort": "g"}])
    named = {"dataset_prompt_field": "ask", "dataset_response_field": "say", "forget_dataset_name": str(drop)}
    data = load_text_data(config(keep, forget_dataset_prompt_field="frage", forget_dataset_response_field="antwort", **named))
    assert (data.retain.prompts, data.forget.responses) == (("q",), ("g",))
    with pytest.raises(DataError, match=r"no column 'say'; it has frage, antwort: .*--forget_dataset_response_field"):
        check_text_inputs(config(keep, **named))
    with pytest.raises(DataError, match=r"no column 'answer' or .*; it has ask, say, question: .*--dataset_response_field"):
        check_text_inputs(config(keep, forget_dataset_name=str(drop)))
    with pytest.raises(DataError, match="'say' as prompts and as responses"):
        check_text_inputs(config(keep, **(named | {"dataset_prompt_field": "say"})))
    again = write(tmp_path / "again.jsonl", [{"question": "x", "say": "b"}])
    plain = {"dataset_prompt_field": "", "dataset_response_field": "say", "forget_dataset_name": str(again)}
    assert load_text_data(config(keep, **plain)).retain.prompts == ("",)


def test_rows_without_an_answer_are_counted_and_skipped_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(0), {"question": "q", "answer": " \n"}, {"question": "q", "answer": ""}, {"question": "q"}, row(4)]
    keep = write(tmp_path / "keep.jsonl", rows)
    drop = write(tmp_path / "drop.jsonl", [{"question": "q", "answer": ""}, row(9)])
    settings = {"forget_dataset_name": str(drop)}
    with caplog.at_level(logging.WARNING):
        data = load_text_data(config(keep, **settings))
    assert data.retain.responses == ("a 0", "a 4")
    assert data.provenance["n_empty"] == 4
    assert [record.getMessage() for record in caplog.records] == ["rows without an answer are skipped: 3 of retain, 1 of forget"]
    with pytest.raises(DataError, match="3 rows with an empty 'answer', the first is row 1.*--strict"):
        load_text_data(config(keep, strict=True, **settings))
    write(drop, [{"question": "q", "answer": ""}])
    with pytest.raises(DataError, match="the forget rows .* are none"):
        load_text_data(config(keep, **settings))


def test_cells_that_are_no_text_are_refused(tmp_path: Path) -> None:
    drop = write(tmp_path / "drop.jsonl", [row(9)])
    for rows, message in (
        ([{"question": "q", "answer": 3}], "holds int64 in column 'answer', not text; .*--dataset_response_field"),
        ([{"question": ["q"], "answer": "a"}], "in column 'question', not text; .*--dataset_prompt_field"),
        ([row(0), {"question": "q", "answer": 3}], "column 'answer'"),
    ):
        keep = write(tmp_path / "keep.jsonl", rows)
        with pytest.raises(DataError, match=message):
            check_text_inputs(config(keep, forget_dataset_name=str(drop)))
    keep = write(tmp_path / "keep.jsonl", [row(0), {"question": None, "answer": "a"}])
    with pytest.raises(DataError, match="no 'question' in row 1"):
        load_text_data(config(keep, forget_dataset_name=str(drop)))


def test_forget_rows_among_the_retain_rows_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep = write(tmp_path / "keep.jsonl", [row(number) for number in range(4)])
    drop = write(tmp_path / "drop.jsonl", [row(3), row(2, "other"), row(9)])
    with caplog.at_level(logging.WARNING):
        data = load_text_data(config(keep, forget_dataset_name=str(drop)))
    assert data.provenance["n_forget_in_retain"] == 1
    assert "1 of 3 forget rows are retain rows too, word for word" in caplog.text
    caplog.clear()
    settings = {"forget_dataset_name": str(drop), "add_duplicate_to_retain": True, "duplicate_dataset_name": str(drop)}
    load_text_data(config(keep, **settings))
    assert caplog.text == ""


def test_names_for_paths(tofu: Path, waterdrum: Path) -> None:
    names = {"authors": "authors", "tofu": "tofu", "locuslab/TOFU": "tofu", "Glow-AI/WaterDrum-TOFU": "waterdrum_tofu"}
    names |= {"waterdrum_tofu": "waterdrum_tofu", "owner/Some-Set": "Some-Set", str(tofu): "tofu", f"{waterdrum}/": "duplicates"}
    assert {name: text_task_name(config(name)) for name in names} == names
    assert forget_group(config(tofu)) == "forget10"
    assert forget_group(config(tofu, dataset_subset="retain90", forget_pct=5)) == "forget05_retain90"
    assert forget_group(config("waterdrum_tofu", dataset_subset="forget_10", forget_pct=5)) == "forget_05_retain_forget_10"
    assert forget_group(config("owner/set", forget_dataset_name="owner/other set")) == "other_set"


def test_the_hub_is_not_asked_and_its_revision_is_of_its_dataset_alone(tmp_path: Path) -> None:
    drop = write(tmp_path / "drop.jsonl", [row(9)])
    settings = config("owner/set", dataset_revision="abc", forget_dataset_name=str(drop), test_dataset_split="test")
    check_text_inputs(settings)  # the tests have no network: asking would be refused
    sources = resolve_sources(settings)
    assert [sources[part].revision for part in ("retain", "forget", "test")] == ["abc", None, "abc"]
    assert sources["retain"].describe() == "owner/set at abc, split train"
    assert resolve_sources(config("tofu"))["forget"].describe() == "locuslab/TOFU, subset forget10, split train"
    with pytest.raises(DataError, match="cannot load dataset 'owner/set', split 'train', revision 'abc'"):
        load_text_data(settings)


def test_missing_files_are_refused_before_any_work(tmp_path: Path) -> None:
    keep = write(tmp_path / "keep.jsonl", [row(0)])
    with pytest.raises(DataError, match="not an existing folder or"):
        check_text_inputs(config(keep, forget_dataset_name=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no split 'forget'; it has: train"):
        check_text_inputs(config(keep, forget_dataset_split="forget"))


def test_the_hash_follows_rows_parts_and_order() -> None:
    def rows(*pairs: tuple[str, str]) -> TextRows:
        return TextRows(prompts=tuple(p for p, _ in pairs), responses=tuple(r for _, r in pairs))

    one, two = ("q", "ab"), ("qa", "b")
    lists = [
        (rows(one, two), rows()),
        (rows(two, one), rows()),
        (rows(one), rows(two)),
        (rows(two), rows(one)),
        (rows(("", "qab"), two), rows()),
        (rows(("q", "äb"), two), rows()),
    ]
    assert len({sha256_texts(*parts) for parts in lists}) == len(lists)
    assert sha256_texts(rows(one)) == sha256_texts(rows(one))


def test_folders_of_one_name_and_two_forms_are_read_by_content(tmp_path: Path, tofu: Path) -> None:
    same, other = write_tofu(tmp_path / "a" / "tofu"), write_tofu(tmp_path / "b" / "tofu")
    write(other / "forget10.json", [row(number, "b") for number in range(90, 100)])
    hashes = [load_text_data(config(folder)).sha256 for folder in (tofu, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_text_data_survive_pickling(tofu: Path) -> None:
    data = load_text_data(config(tofu), with_perturbed=True)
    again = pickle.loads(pickle.dumps(data))
    assert again.sha256 == data.sha256 and again.retain.prompts == data.retain.prompts
    assert again.n_bytes == data.n_bytes
