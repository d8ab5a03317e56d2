"""Answers that a language model writes itself, greedily, and how much of the true answers is in them (ROUGE-L recall)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hamu.errors import ConfigError, DataError
from hamu.models.loading import quiet
from hamu.models.tokens import encode_rows

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 200
"""As TOFU's published tables."""

_SOME_ANSWER = "7531"  # `encode_rows` wants an answer; the tokens before it do not depend on which


@torch.inference_mode()
def generate_answers(
    net: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int,
    pad_id: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_length: int | None = None,
    chat: bool | None = None,
) -> list[str]:
    """Return the model's own answer to each prompt: always the likeliest next token, until a token that ends the text.

    Prompts have the tokens that `encode_rows` gives them, and are padded on the left, those of similar lengths together. What a
    model's folder says of its decoding (sampling, penalties) is not followed, but for its end tokens. Every module is in
    evaluation mode meanwhile, and afterwards in the mode it was in; the model's settings stay as they are.

    Args:
        net: `LanguageModel.net`: a causal model of transformers, or of peft.
        tokenizer: the model's.
        prompts: questions, none empty.
        batch_size: prompts a pass.
        pad_id: token that fills the prompts up (`pad_id_of`).
        max_new_tokens: most tokens of an answer.
        max_length: tokens of the model's context; None: no limit is known. At least half of it is for the prompt: answers are
            shorter where needed, and a prompt that is still too long is cut from the left, which is logged.
        chat: as `encode_rows`.

    Returns:
        n texts without special tokens and outer spaces, in the order of the prompts; perhaps empty ones.

    Raises:
        ConfigError: `batch_size` or `max_new_tokens` is below 1, or `max_length` below 2; or as `encode_rows`.
        DataError: a prompt is empty, or as `encode_rows`.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("max_length", max_length, 2),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}")
    if not prompts:
        return []
    n_new = max_new_tokens if max_length is None else min(max_new_tokens, max_length // 2)
    heads = _prompt_ids(tokenizer, prompts, chat=chat, longest=None if max_length is None else max_length - n_new)
    device = next(net.parameters()).device
    answers = [""] * len(prompts)
    order = sorted(range(len(heads)), key=lambda row: -len(heads[row]))  # the longest first: memory runs out early or never
    with _evaluating(net), _greedy(net, tokenizer, n_new, pad_id) as model, quiet():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(heads[rows[0]])
            ids = torch.full((len(rows), width), pad_id)
            mask = torch.zeros_like(ids)
            for at, row in enumerate(rows):
                ids[at, width - len(heads[row]) :] = torch.tensor(heads[row])
                mask[at, width - len(heads[row]) :] = 1
            written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))[:, width:]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
    return answers


def rouge_l_recall(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the ROUGE-L recall of each prediction: the longest common subsequence of words over the reference's words.

    Words are runs of a-z and 0-9 in lower case, those of more than three letters stemmed (Porter), as in TOFU's tables.

    Args:
        predictions: n texts.
        references: n texts, the true answers.

    Returns:
        (n,), in [0, 1], float64, in the same order; 0 where one of the two has no word.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3; the package `rouge-score`.
    """
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which other runs need not wait for

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    return np.array([scorer.score(reference, prediction)["rougeL"].recall for reference, prediction in pairs], dtype=np.float64)


def _prompt_ids(tokenizer: Any, prompts: Sequence[str], *, chat: bool | None, longest: int | None) -> list[list[int]]:
    """Take what comes before the answers of encoded rows, cut from the left to at most `longest` tokens."""
    if "" in prompts:
        raise DataError(
            f"row {list(prompts).index('')} has no prompt to answer: it is a plain text; generate answers to questions alone"
        )
    packed = encode_rows(tokenizer, prompts, [_SOME_ANSWER] * len(prompts), max_length=None, chat=chat)
    rows = (ids.tolist() for ids in packed.ids.tensor_split(packed.offsets[1:-1]))
    heads: list[list[int]] = [ids[:n] for ids, n in zip(rows, packed.answer_starts.tolist(), strict=True)]
    if longest is None:
        return heads
    n_cut = sum(len(head) > longest for head in heads)
    if n_cut:
        logger.warning("%d of %d prompts were cut from the left to %d tokens, to answer them", n_cut, len(heads), longest)
    return [_cut(head, longest, tokenizer.bos_token_id) for head in heads]


def _cut(head: list[int], longest: int, begin: int | None) -> list[int]:
    if len(head) <= longest:
        return head
    first = head[:1] if longest > 1 and head[0] == begin else []
    return first + head[len(head) - longest + len(first) :]


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the block, and back into its own mode after it."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _greedy(net: Any, tokenizer: Any, n_new: int, pad_id: int) -> Iterator[Any]:
    """Give the model of transformers under an adapter, decoding greedily inside the block, with its cache on.

    Its own decoding settings are exchanged, not overruled: `generate` would take over from them whatever is not named here.
    """
    from transformers import GenerationConfig

    model: Any = net.get_base_model() if hasattr(net, "get_base_model") else net
    before = model.generation_config
    own = before.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=n_new,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends) or None,
    )
    try:
        yield model
    finally:
        model.generation_config = before
