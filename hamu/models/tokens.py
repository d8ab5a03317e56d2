"""Rows of text as token ids: tokenised once, kept as packed tensors, and padded into batches without a loop over rows.

A row is a prompt and a response. A question and its answer are put into the tokenizer's chat template where it has one, else
into `PLAIN_PROMPT` and `PLAIN_ANSWER`; a row with the prompt "" is a plain text. Labels are the tokens of the answer and the
token that ends it; everything before is read, never predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamu.errors import ConfigError, DataError
from hamu.hub import one_line

logger = logging.getLogger(__name__)

PLAIN_PROMPT = "Question: {prompt}\nAnswer:"
"""A question where there is no chat template; the beginning-of-text token stands before it where the tokenizer has one."""
PLAIN_ANSWER = " {response}"
"""The answer after it, followed by the end-of-text token."""
CHAT_DATE = "26 Jul 2024"
"""Today, for chat templates that write the date: with the real one, tokens would change from day to day. (Llama 3's default.)"""

Ids = list[list[int]]


@dataclass(frozen=True, eq=False)
class TextBatch:
    """A padded batch; m is the number of its labels."""

    ids: Tensor
    """(n, t) int64, padded on the right."""
    mask: Tensor
    """(n, t) int64: 1 where a token is, 0 where padding is."""
    where: Tensor
    """(m,) int64: row * t + position of the token before each label, whose logits predict it."""
    labels: Tensor
    """(m,) int64: the tokens to predict, row by row."""
    row_of: Tensor
    """(m,) int64: row in the batch of each label."""
    n_rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """Tokenised rows, one after another."""

    ids: Tensor
    """(n_tokens,) int32."""
    offsets: Tensor
    """(n_rows + 1,) int64: row i is ids[offsets[i]:offsets[i + 1]]."""
    answer_starts: Tensor
    """(n_rows,) int64, at least 1: position in the row of its first label; all later tokens are labels too."""
    n_truncated: int
    """Rows whose prompt was cut from the left."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(n_rows,) int64, tokens of each row."""
        return self.offsets.diff()

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.numel() * part.element_size() for part in (self.ids, self.offsets, self.answer_starts))

    def to(self, device: torch.device | str) -> PackedRows:
        """Return the rows on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "offsets", "answer_starts")}
        return replace(self, **moved)

    def batch(self, rows: Tensor, *, pad_id: int) -> TextBatch:
        """Return the rows at these positions as a batch on the same device.

        Args:
            rows: (n,) int64 positions, in the order wanted; may repeat.
            pad_id: token that fills rows up to the longest one (`pad_id_of`).
        """
        rows = rows.to(self.offsets.device)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        width = int(lengths.max()) if len(rows) else 0
        column = torch.arange(width, device=rows.device)
        is_token = column < lengths[:, None]
        at = (starts[:, None] + column).clamp_(max=max(len(self.ids) - 1, 0))
        ids = self.ids[at].long().masked_fill_(~is_token, pad_id)
        labelled = (is_token & (column >= self.answer_starts[rows][:, None])).flatten().nonzero().squeeze(1)
        row_of = labelled // width if width else labelled
        return TextBatch(ids, is_token.long(), labelled - 1, ids.flatten()[labelled], row_of, len(rows))


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the padding token, else the end-of-text token, else 0. Which is said once; masks hide it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    filler = "id 0" if tokenizer.eos_token_id is None else repr(tokenizer.eos_token)
    _say_once(f"the tokenizer has no padding token; padding with {filler} instead")
    return 0 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    max_length: int | None,
    chat: bool | None = None,
) -> PackedRows:
    """Tokenise rows of text.

    With a chat template, the row is the template's text of question and answer up to the token that ends the answer. In the
    plain form it is `PLAIN_PROMPT` + `PLAIN_ANSWER`, in a row with an empty prompt the response alone; both with the
    beginning-of-text token before and the end-of-text token after, where the tokenizer has them.

    Args:
        prompts: one a row; "" makes the whole response the text to learn, of which the first token is no label where the
            tokenizer has no beginning-of-text token to predict it from.
        responses: one a row, not empty.
        max_length: most tokens of a row (the model's context), at least 2; None: any number. A longer row loses tokens of its
            prompt from the left (the beginning-of-text token stays), which is counted and logged.
        chat: whether to use the chat template for rows with a prompt; None: where the tokenizer has one.

    Returns:
        The rows in the same order, on the CPU.

    Raises:
        ConfigError: `chat` is True and the tokenizer has no chat template.
        DataError: the chat template drops or changes an answer, or an answer does not fit into `max_length`.
    """
    if len(prompts) != len(responses):
        raise DataError(f"got {len(prompts)} prompts and {len(responses)} responses; give one of each a row")
    if chat and not tokenizer.chat_template:
        raise ConfigError("chat_template True, but the tokenizer has none; leave it out, or give a chat model's tokenizer")
    use_chat = bool(tokenizer.chat_template) if chat is None else chat
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    asked = [row for row, prompt in enumerate(prompts) if prompt]
    whole_texts = [row for row, prompt in enumerate(prompts) if not prompt]

    heads: Ids = [begin] * len(prompts)
    answers: Ids = [[]] * len(prompts)
    if asked:
        questions, replies = [prompts[row] for row in asked], [responses[row] for row in asked]
        pairs = _chat_texts(tokenizer, questions, replies) if use_chat else _plain_texts(questions, replies)
        for row, head, answer in zip(asked, *_split_ids(tokenizer, *pairs), strict=True):
            heads[row], answers[row] = (head, answer) if use_chat else (begin + head, answer + end)
    for row, answer in zip(whole_texts, _ids(tokenizer, [responses[row] for row in whole_texts]), strict=True):
        answers[row] = answer + end
    for row in range(len(prompts)):
        if not heads[row]:  # nothing to predict the first token from, so it is no label
            heads[row], answers[row] = answers[row][:1], answers[row][1:]
        if not heads[row] or not answers[row]:
            raise DataError(f"row {row} has no token to learn: {responses[row][:80]!r}; remove it, or give a longer response")
    heads, n_truncated = _cut(heads, answers, begin, max_length)
    lengths = [len(head) + len(answer) for head, answer in zip(heads, answers, strict=True)]
    tokens = chain.from_iterable(chain.from_iterable(zip(heads, answers, strict=True)))
    return PackedRows(
        ids=torch.from_numpy(np.fromiter(tokens, dtype=np.int32, count=sum(lengths))),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        answer_starts=torch.tensor([len(head) for head in heads], dtype=torch.int64),
        n_truncated=n_truncated,
    )


def _plain_texts(prompts: list[str], responses: list[str]) -> tuple[list[str], list[str]]:
    return (
        [PLAIN_PROMPT.format(prompt=prompt) for prompt in prompts],
        [PLAIN_ANSWER.format(response=response) for response in responses],
    )


def _chat_texts(tokenizer: Any, prompts: list[str], responses: list[str]) -> tuple[list[str], list[str]]:
    """Each row's text in the chat template: what comes before the answer, and the answer with the token that ends it."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    told = [[*chat, {"role": "assistant", "content": response}] for chat, response in zip(asked, responses, strict=True)]
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = f"{{%- macro strftime_now(form) -%}}{CHAT_DATE}{{%- endmacro -%}}" + template
        # Models that think aloud by default answer at once; other templates do not know the word and ignore it.
        fixed = {"chat_template": template, "tokenize": False, "enable_thinking": False}
        heads = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **fixed)
        texts = tokenizer.apply_chat_template(told, **fixed)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"the chat template cannot write a question and its answer ({one_line(error)}); set chat_template to False"
        ) from error
    end = tokenizer.eos_token or ""
    split = [_split_chat(row, *texts, end=end) for row, texts in enumerate(zip(heads, texts, responses, strict=True))]
    return [head for head, _ in split], [answer for _, answer in split]


def _split_chat(row: int, head: str, text: str, response: str, *, end: str) -> tuple[str, str]:
    if not text.startswith(head):
        raise DataError(
            f"row {row}: with the answer the chat template writes another prompt than without it ({head[-40:]!r} against "
            f"{text[: len(head)][-40:]!r}); set chat_template to False"
        )
    rest, answer = text[len(head) :], response.strip()
    at = rest.find(answer)
    if at < 0:
        raise DataError(
            f"row {row}: the chat template drops the answer {response[:80]!r} (after the prompt it writes {rest[:80]!r}); "
            "set chat_template to False, or give a tokenizer whose template keeps it"
        )
    # A header that the template's generation prompt leaves out is no part of the answer; spaces belong to the next word.
    before, after = rest[:at], rest[at + len(answer) :].rstrip()
    n_header = len(before.rstrip(" ")) if before.strip() else 0
    return head + before[:n_header], before[n_header:] + answer + (after or end)


def _split_ids(tokenizer: Any, heads: list[str], answers: list[str]) -> tuple[Ids, Ids]:
    """Tokenise heads and whole texts; a whole text that does not begin with its head's tokens is tokenised in two parts."""
    n = len(heads)
    encoded = _ids(tokenizer, [*heads, *(head + answer for head, answer in zip(heads, answers, strict=True))])
    head_ids, whole_ids = encoded[:n], encoded[n:]
    rests = [whole[len(head) :] if whole[: len(head)] == head else [] for head, whole in zip(head_ids, whole_ids, strict=True)]
    torn = [row for row, rest in enumerate(rests) if not rest]
    for row, rest in zip(torn, _ids(tokenizer, [answers[row] for row in torn]), strict=True):
        rests[row] = rest
    return head_ids, rests


def _ids(tokenizer: Any, texts: list[str]) -> Ids:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    found: Ids = encoded["input_ids"]
    return found


def _cut(heads: Ids, answers: Ids, begin: list[int], max_length: int | None) -> tuple[Ids, int]:
    """Cut heads from the left until their rows have `max_length` tokens; also return how many rows were cut."""
    if max_length is None:
        return heads, 0
    n_cut, kept = 0, list(heads)
    for row, (head, answer) in enumerate(zip(heads, answers, strict=True)):
        room = max_length - len(answer)
        if len(head) <= room:
            continue
        if room < 1:
            raise DataError(
                f"the answer of row {row} has {len(answer)} tokens, which with one before it is more than the {max_length} "
                "of max_length or of the model's context; raise max_length, or remove the row"
            )
        n_cut += 1
        first = begin if begin and head[:1] == begin else []
        n_last = room - len(first)
        kept[row] = first + head[len(head) - n_last :]
    if n_cut:
        logger.warning("%d of %d prompts were cut from the left to rows of %d tokens", n_cut, len(heads), max_length)
    return kept, n_cut


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
