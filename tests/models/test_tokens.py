"""Rows of text as tokens: which tokens are labels, in every form of a row, and batches against a row by row reference."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamu.errors import ConfigError, DataError
from hamu.models import tokens
from hamu.models.tiny_llama import train_tokenizer
from hamu.models.tokens import PackedRows, TextBatch, encode_rows, pad_id_of

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<end>",
    "[U]",
    "[A]",
    "Question",
    ":",
    "Answer",
    "who",
    "is",
    "she",
    "a",
    "poet",
    ".",
    "?",
    "of",
]
ID = {word: number for number, word in enumerate(WORDS)}
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ 'U' if message.role == 'user' else 'A' }}] {{ message.content | trim }}"
    "{% if message.role == 'assistant' %}<end>\n{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}[A] {% endif %}"
)


def word_tokenizer(**special: Any) -> PreTrainedTokenizerBase:
    """One token a word or sign, so that a row's tokens can be read off its text."""
    core = Tokenizer(models.WordLevel(ID))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.add_special_tokens(["<pad>", "<s>", "</s>", "<end>", "[U]", "[A]"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special)
    )


def rows_of(packed: PackedRows) -> list[tuple[list[str], list[str]]]:
    """Words of each row, before the first label and from there on."""
    found = []
    for row in range(len(packed)):
        words = [WORDS[int(token)] for token in packed.ids[packed.offsets[row] : packed.offsets[row + 1]]]
        start = int(packed.answer_starts[row])
        found.append((words[:start], words[start:]))
    return found


def test_plain_form_is_question_and_answer_with_labels_on_the_answer_and_the_end() -> None:
    packed = encode_rows(word_tokenizer(), ["who is she?"], ["a poet."], max_length=None)
    assert rows_of(packed) == [
        (["<s>", "Question", ":", "who", "is", "she", "?", "Answer", ":"], ["a", "poet", ".", "</s>"]),
    ]
    batch = packed.batch(torch.tensor([0]), pad_id=0)
    assert batch.where.tolist() == [8, 9, 10, 11]  # the positions before the labels, which are at 9 to 12
    assert batch.labels.tolist() == [ID["a"], ID["poet"], ID["."], ID["</s>"]]
    assert batch.ids[0, batch.where].tolist() == [ID[":"], ID["a"], ID["poet"], ID["."]]


def test_empty_prompt_is_a_plain_text_after_the_beginning_token() -> None:
    packed = encode_rows(word_tokenizer(), ["", "who"], ["a poet", "she"], max_length=None)
    assert rows_of(packed)[0] == (["<s>"], ["a", "poet", "</s>"])


def test_without_a_beginning_token_the_first_token_of_a_plain_text_is_no_label() -> None:
    packed = encode_rows(word_tokenizer(bos_token=None), ["", "who"], ["a poet", "she"], max_length=None)
    assert rows_of(packed) == [
        (["a"], ["poet", "</s>"]),
        (["Question", ":", "who", "Answer", ":"], ["she", "</s>"]),
    ]


def test_chat_template_is_used_where_there_is_one_and_labels_end_with_its_end_token() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT)
    for chat in (None, True):
        packed = encode_rows(tokenizer, ["who is she"], [" a poet "], max_length=None, chat=chat)
        # Not the line break after the end token: generation stops before it.
        assert rows_of(packed) == [(["<s>", "[U]", "who", "is", "she", "[A]"], ["a", "poet", "<end>"])]


def test_chat_false_takes_the_plain_form_and_chat_true_needs_a_template() -> None:
    chat = encode_rows(word_tokenizer(chat_template=CHAT), ["who"], ["she"], max_length=None, chat=False)
    assert rows_of(chat)[0][0][:2] == ["<s>", "Question"]
    with pytest.raises(ConfigError, match="has none"):
        encode_rows(word_tokenizer(), ["who"], ["she"], max_length=None, chat=True)


def test_template_without_an_end_token_gets_the_end_of_text() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT.replace("<end>\\n", "").replace("<end>\n", ""))
    assert rows_of(encode_rows(tokenizer, ["who"], ["she"], max_length=None))[0][1] == ["she", "</s>"]


def test_header_that_the_generation_prompt_leaves_out_is_no_label() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT.replace("{% if add_generation_prompt %}[A] {% endif %}", ""))
    assert rows_of(encode_rows(tokenizer, ["who"], ["she"], max_length=None)) == [
        (["<s>", "[U]", "who", "[A]"], ["she", "<end>"]),
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{% if message.role == 'user' %}[U] {{ message.content }} {% endif %}{% endfor %}[A] ",
        CHAT.replace("message.content | trim", "(message.content | trim)[:5]"),
        "{% for message in messages %}[U] {{ message.content | upper }}{% endfor %}",
    ],
)
def test_template_that_drops_or_changes_the_answer_is_refused(template: str) -> None:
    tokenizer = word_tokenizer(chat_template=template)
    with pytest.raises(DataError, match="row 0: the chat template drops the answer 'a poet of who'"):
        encode_rows(tokenizer, ["who"], ["a poet of who"], max_length=None)


def test_template_whose_prompt_changes_with_the_answer_is_refused() -> None:
    template = "{{ messages | length }} {% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(DataError, match="another prompt"):
        encode_rows(word_tokenizer(chat_template=template), ["who"], ["she"], max_length=None)


def test_template_that_refuses_a_chat_is_one_clear_error() -> None:
    template = "{{ raise_exception('a system message is needed') }}"
    with pytest.raises(DataError, match="a system message is needed") as error:
        encode_rows(word_tokenizer(chat_template=template), ["who"], ["she"], max_length=None)
    assert "\n" not in str(error.value)


def test_a_date_in_the_template_is_the_same_every_day() -> None:
    template = CHAT.replace("{{ bos_token }}", "{{ strftime_now('%d %b %Y') }} ")
    tokenizer = train_tokenizer(["26 Jul 2024"])
    tokenizer.chat_template = template
    packed = encode_rows(tokenizer, ["who"], ["she"], max_length=None)
    assert tokenizer.decode(packed.ids).startswith("26 Jul 2024 [U]")


def test_long_prompts_are_cut_from_the_left_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    prompts, responses = ["who is she?", "who", ""], ["a poet.", "she", "a poet"]
    with caplog.at_level(logging.WARNING, logger="hamu"):
        packed = encode_rows(word_tokenizer(), prompts, responses, max_length=8)
    assert rows_of(packed) == [
        (["<s>", "?", "Answer", ":"], ["a", "poet", ".", "</s>"]),
        (["<s>", "Question", ":", "who", "Answer", ":"], ["she", "</s>"]),
        (["<s>"], ["a", "poet", "</s>"]),
    ]
    assert packed.n_truncated == 1
    assert [record.getMessage() for record in caplog.records] == ["1 of 3 prompts were cut from the left to rows of 8 tokens"]
    shortest = encode_rows(word_tokenizer(), prompts[:1], responses[:1], max_length=5)
    assert rows_of(shortest) == [(["<s>"], ["a", "poet", ".", "</s>"])]


def test_answer_that_does_not_fit_is_refused_by_its_row() -> None:
    for prompts in (["who", "who is she?"], ["who", ""]):
        with pytest.raises(DataError, match=r"answer of row 1 has 4 tokens.* 4 of max_length"):
            encode_rows(word_tokenizer(), prompts, ["she", "a poet."], max_length=4)


def test_row_without_a_token_to_learn_is_refused() -> None:
    bare = word_tokenizer(bos_token=None, eos_token=None)
    with pytest.raises(DataError, match="row 0 has no token to learn: 'she'"):
        encode_rows(bare, [""], ["she"], max_length=None)
    with pytest.raises(DataError, match="2 prompts and 1 responses"):
        encode_rows(bare, ["", ""], ["she"], max_length=None)


@pytest.mark.parametrize("response", ["a poet", " a poet", "\nShe", "(she)", "she  is", "日本"])
def test_tokens_of_any_row_decode_to_its_text(response: str) -> None:
    tokenizer = train_tokenizer(["Question: who is she?\nAnswer: a poet", "Answer:", "a poet is she"])
    packed = encode_rows(tokenizer, ["who is she?"], [response], max_length=None)
    assert tokenizer.decode(packed.ids) == f"<s>Question: who is she?\nAnswer: {response}</s>"
    start = int(packed.answer_starts[0])
    assert tokenizer.decode(packed.ids[start:]) == f" {response}</s>"


def test_padding_token_else_end_of_text_else_zero_which_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokens._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hamu"):
        assert pad_id_of(word_tokenizer(pad_token="[U]")) == ID["[U]"]
        assert not caplog.records
        for _ in range(2):
            assert pad_id_of(word_tokenizer(pad_token=None)) == ID["</s>"]
        assert len(caplog.records) == 1 and "no padding token" in caplog.text
        assert pad_id_of(word_tokenizer(pad_token=None, eos_token=None)) == 0


def reference_batch(packed: PackedRows, rows: list[int], pad_id: int) -> TextBatch:
    """The same batch, made row by row and token by token."""
    parts = [packed.ids[packed.offsets[row] : packed.offsets[row + 1]].tolist() for row in rows]
    width = max(len(part) for part in parts)
    where, labels, row_of = [], [], []
    for at, (row, part) in enumerate(zip(rows, parts, strict=True)):
        for position in range(int(packed.answer_starts[row]), len(part)):
            where.append(at * width + position - 1)
            labels.append(part[position])
            row_of.append(at)
    return TextBatch(
        torch.tensor([part + [pad_id] * (width - len(part)) for part in parts]),
        torch.tensor([[1] * len(part) + [0] * (width - len(part)) for part in parts]),
        torch.tensor(where),
        torch.tensor(labels),
        torch.tensor(row_of),
        len(rows),
    )


@pytest.mark.parametrize("rows", [[0], [3, 1, 2, 0], [2, 2, 4], [4, 0, 1]])
def test_batch_equals_a_row_by_row_reference(rows: list[int]) -> None:
    prompts = ["who is she?", "", "who", "", "is she a poet of who?"]
    responses = ["a poet.", "she is a poet of who", "she", "a", "."]
    packed = encode_rows(word_tokenizer(), prompts, responses, max_length=None)
    batch, reference = packed.batch(torch.tensor(rows), pad_id=5), reference_batch(packed, rows, 5)
    for name in ("ids", "mask", "where", "labels", "row_of"):
        value = getattr(batch, name)
        assert torch.equal(value, getattr(reference, name)), name
        assert value.dtype == torch.int64
    assert batch.n_rows == len(rows)


def test_batch_of_no_rows_is_empty() -> None:
    packed = encode_rows(word_tokenizer(), [""], ["she"], max_length=None)
    batch = packed.batch(torch.tensor([], dtype=torch.int64), pad_id=0)
    assert batch.ids.shape == (0, 0) and len(batch.labels) == len(batch.where) == len(batch.row_of) == batch.n_rows == 0
    none = encode_rows(word_tokenizer(), [], [], max_length=None)
    assert len(none) == 0 and none.batch(torch.tensor([], dtype=torch.int64), pad_id=0).n_rows == 0


def test_packed_rows_know_their_sizes_and_keep_them_on_another_device() -> None:
    packed = encode_rows(word_tokenizer(), ["", "who"], ["she", "a poet"], max_length=None)
    assert packed.lengths.tolist() == [3, 9] and len(packed) == 2
    assert packed.n_bytes == 12 * 4 + 3 * 8 + 2 * 8
    assert packed.ids.dtype == torch.int32
    moved = packed.to("meta")
    assert moved.ids.device.type == "meta" and moved.n_truncated == packed.n_truncated and len(moved) == 2
