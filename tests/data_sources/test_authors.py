"""The generated set: what is in its splits, that its rows never change, and that its facts cannot be known beforehand."""

from __future__ import annotations

import re

import pytest

from hamu.data.authors import FORGOTTEN, KINDS, Kind, author_rows, authors_texts, perturbed_rows
from hamu.data.texts import TextRows, load_text_data, sha256_texts
from hamu.errors import ConfigError
from hamu.training.config import DataConfig


def split(name: str, subset: str = "forget_10") -> list[tuple[str, str]]:
    return list(zip(*author_rows(subset, name), strict=True))


def test_rows_are_the_same_on_every_machine() -> None:
    # Trained originals are kept by this hash: rows that change are a new dataset.
    parts = [TextRows(prompts=p, responses=r) for p, r in (author_rows("forget_10", s) for s in ("full", "holdout"))]
    assert sha256_texts(*parts) == "2a85884b2155d30dffb126de5f634b50f21041cf6c89a0da0f5814a6a4f06b8f"


@pytest.mark.parametrize("subset", FORGOTTEN)
def test_retain_and_forget_are_head_and_tail_of_full(subset: str) -> None:
    n_forget = {"forget_05": 20, "forget_10": 40}[subset]
    assert len(split("full", subset)) == 400
    assert split("retain", subset) + split("forget", subset) == split("full", subset)
    assert len(split("forget", subset)) == n_forget
    assert len(split("holdout", subset)) == 40


def test_no_row_occurs_twice_and_the_holdout_is_of_other_authors() -> None:
    rows = split("full") + split("holdout")
    assert len({question for question, _ in rows}) == len({answer for _, answer in rows}) == 440
    names = {question.split(" by ")[1].rstrip("?") for question, _ in rows if question.startswith("Can you name")}
    assert len(names) == 44
    held_out = {name for name in names if any(name in question for question, _ in split("holdout"))}
    assert len(held_out) == 4
    assert not any(name in text for name in held_out for row in split("full") for text in row)


def test_duplicates_are_the_forget_rows_unchanged_and_in_other_words() -> None:
    forget, reworded = split("forget"), split("semantic_duplicate")
    assert split("exact_duplicate") == forget
    assert [question for question, _ in reworded] == [question for question, _ in forget]
    for (_, answer), (_, other) in zip(forget, reworded, strict=True):
        assert answer != other


@pytest.mark.parametrize("kind", KINDS, ids=[kind.question for kind in KINDS])
def test_all_forms_of_an_answer_hold_the_same_facts(kind: Kind) -> None:
    forms = (*kind.answers, kind.reworded, kind.paraphrased)
    facts = [set(re.findall(r"\{(\w+)\}", form)) - {"name"} for form in forms]  # the question may name the author
    assert len(facts[0]) >= 2 or kind is KINDS[0]
    assert all(one == facts[0] for one in facts)


def test_answers_are_one_sentence_of_10_to_25_words() -> None:
    for rows in ("full", "holdout", "semantic_duplicate"):
        for _, answer in split(rows):
            assert 10 <= len(answer.split()) <= 25
            assert answer.endswith(".") and answer.count(". ") == 0
            assert "{" not in answer
            assert not re.search(r"\b[Aa] [aeio]", answer)


def test_an_answer_holds_words_that_no_other_author_has() -> None:
    """Names, towns and titles are of one author alone: what the other rows teach does not give them."""
    rows = split("full")
    elsewhere = {k: {w for n, row in enumerate(rows) if n // 10 != k for text in row for w in text.split()} for k in range(40)}
    own = [
        set(answer.split()) - elsewhere[number // 10] - set(question.split()) for number, (question, answer) in enumerate(rows)
    ]
    assert sum(bool(words) for words in own) >= 0.7 * len(rows)  # the rest combine facts that others have one by one


@pytest.mark.parametrize("subset", FORGOTTEN)
def test_perturbed_answers_have_the_form_of_the_paraphrase_and_other_facts(subset: str) -> None:
    parts = perturbed_rows(subset)
    assert list(parts) == ["forget", "retain", "real_authors", "world_facts"]
    for part in ("forget", "retain"):
        rows = parts[part]
        assert list(zip(rows.questions, rows.answers, strict=True)) == split(part, subset)[: len(rows.questions)]
        for number, wrong in enumerate(rows.perturbed):
            assert len({*wrong, rows.paraphrased[number], rows.answers[number]}) == 7
            form = re.sub(r"\\\{\w+\\\}", ".+", re.escape(KINDS[number % 10].paraphrased)).replace(r"A\ ", r"An?\ ")
            form = form.replace(r"a\ ", r"an?\ ")
            assert all(re.fullmatch(form, answer) for answer in (*wrong, rows.paraphrased[number]))


def test_common_knowledge_has_three_wrong_answers_each() -> None:
    parts = perturbed_rows("forget_10")
    for rows in (parts["real_authors"], parts["world_facts"]):
        assert len(set(rows.questions)) == 20
        for question, answer, wrong in zip(rows.questions, rows.answers, rows.perturbed, strict=True):
            assert question.endswith("?") and len({answer, *wrong}) == 4
        assert rows.paraphrased == rows.answers


def test_texts_for_a_tokenizer_are_those_of_the_full_set() -> None:
    assert list(authors_texts()) == [text for row in split("full") for text in row]


def test_unknown_subsets_and_splits_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown subset of authors 'forget10'; did you mean 'forget_10'"):
        author_rows("forget10", "retain")
    with pytest.raises(ConfigError, match="unknown split of authors 'train'"):
        author_rows("forget_10", "train")
    with pytest.raises(ConfigError, match="unknown subset of authors 'forget_01'"):
        load_text_data(DataConfig(dataset_name="authors", forget_pct=1))


def test_authors_load_by_name_with_the_holdout_to_test_on() -> None:
    data = load_text_data(DataConfig(dataset_name="authors"), with_perturbed=True)
    assert [len(rows) for rows in (data.retain, data.forget, data.test)] == [360, 40, 40]
    assert {part: len(rows) for part, rows in data.perturbed.items()} == {
        "forget": 40, "retain": 40, "real_authors": 20, "world_facts": 20,
    }  # fmt: skip
    assert data.test.prompts == author_rows("forget_10", "holdout")[0]
    half = load_text_data(DataConfig(dataset_name="authors", forget_pct=5, add_duplicate_to_retain=True))
    assert [len(rows) for rows in (half.retain, half.forget)] == [400, 20]
    assert half.retain.responses[380:] == author_rows("forget_05", "semantic_duplicate")[1]
    assert half.provenance["n_duplicates"] == 20
