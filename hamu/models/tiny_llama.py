"""The embedded language model: a Llama of about a million parameters, and a tokenizer trained on the data. No download."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamu.errors import DataError

TINY = "tiny-llama"
TINY_CONTEXT = 1024
"""Longest row of `tiny-llama`, in tokens."""
_VOCABULARY = 2048
_SPREAD, _HEAD_SPREAD, _EMBEDDING_SPREAD = 0.088, 0.2, 0.5
"""Standard deviations of new weights; 0.088 is 1 / sqrt(width), where 0.02 is usual. With these rows are learnt in a quarter of
the epochs, and a LoRA adapter can learn them at all: its head is frozen, and with short rows gives no word much probability."""
_PAD, _BEGIN, _END = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of at most 2,048 tokens, which can write any text.

    The same texts give the same tokenizer, in whatever order and however often they come.

    Args:
        texts: what it is to write in few tokens.

    Raises:
        DataError: there is no text.
    """
    distinct = sorted({text for text in texts if text})
    if not distinct:
        raise DataError("got no text to train a tokenizer on; give at least one row")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BEGIN, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(distinct, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_END,
        model_max_length=TINY_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_tiny_llama(tokenizer: PreTrainedTokenizerBase, *, n_tokens: int, seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build `tiny-llama` with weights drawn from `seed`; the caller's random state is left as it was.

    Args:
        tokenizer: names the special tokens.
        n_tokens: rows of the embedding.
        dtype: that weights drawn in float32 are rounded to.
    """
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=False,
        initializer_range=_SPREAD,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        nn.init.normal_(model.lm_head.weight, std=_HEAD_SPREAD)
        nn.init.normal_(model.model.embed_tokens.weight, std=_EMBEDDING_SPREAD)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
