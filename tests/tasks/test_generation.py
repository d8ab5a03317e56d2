"""Greedy answers against a plain loop without cache or padding, and ROUGE-L by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hamu.errors import ConfigError, DataError
from hamu.models.tokens import encode_rows
from hamu.tasks.generation import generate_answers, rouge_l_recall

pytestmark = pytest.mark.slow

TEXT = "who wrote which book in what year was it a an the moon river stone light bird song 7531 Question : Answer user"
PROMPTS = ["who wrote it", "what", "in which year was the book a song", "the moon", "which bird"]
TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' if loop.first }}{{ message['role'] }} {{ message['content'] }} "
    "{{ '</s>' if message['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def make_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", "<unk>", "assistant", *TEXT.split()]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_net(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,  # logits far apart, so that rounding changes no largest one
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def answer_by_hand(net: Any, tokenizer: Any, head: Sequence[int], n_new: int, ends: Sequence[int] = (2,)) -> str:
    """The whole text through the model for every token, one prompt at a time."""
    ids = list(head)
    while len(ids) < len(head) + n_new:
        with torch.no_grad():
            ids.append(int(net(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return str(tokenizer.decode(ids[len(head) :], skip_special_tokens=True)).strip()


def head_of(tokenizer: Any, prompt: str) -> list[int]:
    rows = encode_rows(tokenizer, [prompt], ["the moon"], max_length=None)
    return rows.ids[: int(rows.answer_starts[0])].tolist()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_equal_those_of_a_loop_without_cache_and_padding(chat: bool, batch_size: int) -> None:
    tokenizer = make_tokenizer(chat=chat)
    net = make_net(tokenizer)
    got = generate_answers(net, tokenizer, PROMPTS, batch_size=batch_size, pad_id=0, max_new_tokens=12)
    assert got == [answer_by_hand(net, tokenizer, head_of(tokenizer, prompt), 12) for prompt in PROMPTS]
    assert len(set(got)) == len(PROMPTS)  # or the claim would be empty


def test_an_answer_stops_at_the_end_tokens_of_tokenizer_and_model() -> None:
    tokenizer = make_tokenizer()
    net = make_net(tokenizer)
    whole = generate_answers(net, tokenizer, PROMPTS[:1], batch_size=1, pad_id=0, max_new_tokens=12)[0].split()
    end = next(word for word in whole[2:] if word not in whole[:2])
    net.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(end)]
    cut = generate_answers(net, tokenizer, PROMPTS[:1], batch_size=1, pad_id=0, max_new_tokens=12)[0].split()
    assert cut == whole[: whole.index(end) + 1]


def test_sampling_and_penalties_of_a_models_folder_are_not_followed() -> None:
    tokenizer = make_tokenizer()
    net = make_net(tokenizer)
    plain = generate_answers(net, tokenizer, PROMPTS, batch_size=5, pad_id=0, max_new_tokens=12)
    net.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1)
    own = net.generation_config
    assert generate_answers(net, tokenizer, PROMPTS, batch_size=5, pad_id=0, max_new_tokens=12) == plain
    assert net.generation_config is own
    assert own.repetition_penalty == 5.0


def test_every_module_is_in_its_own_mode_afterwards_and_no_setting_has_changed() -> None:
    tokenizer = make_tokenizer()
    net = make_net(tokenizer).train()
    net.model.norm.eval()
    modes = [module.training for module in net.modules()]
    generate_answers(net, tokenizer, PROMPTS[:1], batch_size=1, pad_id=0, max_new_tokens=2)
    assert [module.training for module in net.modules()] == modes
    assert net.config.use_cache is False
    net(torch.tensor([[1, 5, 6]])).logits.sum().backward()  # no tensor of inference mode has stayed in the model
    with pytest.raises(IndexError):  # a token that the model does not have
        generate_answers(net, tokenizer, PROMPTS[:2], batch_size=2, pad_id=10_000, max_new_tokens=2)
    assert [module.training for module in net.modules()] == modes


def test_a_model_in_training_with_gradient_checkpointing_answers_the_same() -> None:
    tokenizer = make_tokenizer()
    net = make_net(tokenizer)
    plain = generate_answers(net, tokenizer, PROMPTS, batch_size=2, pad_id=0, max_new_tokens=8)
    net.gradient_checkpointing_enable()
    net.train()
    assert generate_answers(net, tokenizer, PROMPTS, batch_size=2, pad_id=0, max_new_tokens=8) == plain


def test_an_adapter_answers_as_the_model_with_its_weights_merged() -> None:
    peft = pytest.importorskip("peft")
    tokenizer = make_tokenizer()
    base = generate_answers(make_net(tokenizer), tokenizer, PROMPTS, batch_size=2, pad_id=0, max_new_tokens=8)
    settings = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    net = peft.get_peft_model(make_net(tokenizer), settings)
    got = generate_answers(net, tokenizer, PROMPTS, batch_size=2, pad_id=0, max_new_tokens=8)
    merged = net.merge_and_unload()
    assert got == [answer_by_hand(merged, tokenizer, head_of(tokenizer, prompt), 8) for prompt in PROMPTS]
    assert got != base


def test_a_long_prompt_is_cut_from_the_left_behind_its_first_token_and_the_answer_gets_at_most_half(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = make_tokenizer()
    net = make_net(tokenizer)
    prompts = [PROMPTS[2], PROMPTS[1]]
    got = generate_answers(net, tokenizer, prompts, batch_size=2, pad_id=0, max_new_tokens=50, max_length=14)
    long, short = (head_of(tokenizer, prompt) for prompt in prompts)
    assert len(long) > 7 > len(short)
    assert got == [answer_by_hand(net, tokenizer, [long[0], *long[-6:]], 7), answer_by_hand(net, tokenizer, short, 7)]
    assert "1 of 2 prompts were cut from the left to 7 tokens" in caplog.text


def test_bad_input_is_refused_in_one_line() -> None:
    tokenizer = make_tokenizer()
    net = make_net(tokenizer)
    assert generate_answers(net, tokenizer, [], batch_size=1, pad_id=0) == []
    with pytest.raises(DataError, match="row 1 has no prompt"):
        generate_answers(net, tokenizer, ["what", ""], batch_size=1, pad_id=0)
    for setting in ({"batch_size": 0}, {"max_new_tokens": 0}, {"max_length": 1}):
        (name,) = setting
        with pytest.raises(ConfigError, match=f"{name} is {setting[name]}; give at least"):
            generate_answers(net, tokenizer, ["what"], **{"batch_size": 1, "pad_id": 0, **setting})


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("the cat sat", "the cat sat on the mat", 3 / 6),
        ("on the mat sat the cat", "the cat sat on the mat", 3 / 6),  # "on the mat" or "the cat": order counts
        ("The CATS, sitting.", "the cat sits", 3 / 3),  # stems: cat, sit
        ("a dog", "the cat", 0.0),
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("the cat sat and sat and sat", "the cat", 1.0),  # recall asks nothing of the rest
    ],
)
def test_rouge_l_recall_by_hand(prediction: str, reference: str, recall: float) -> None:
    assert rouge_l_recall([prediction], [reference]).tolist() == [recall]


def test_rouge_l_recall_is_the_longest_common_subsequence_over_the_reference() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcd"))
    pairs = [(rng.choice(letters, rng.integers(1, 9)), rng.choice(letters, rng.integers(1, 9))) for _ in range(30)]

    def longest(left: Sequence[str], right: Sequence[str]) -> int:
        """By its definition, over all choices of words of the left text."""
        chosen = ([word for at, word in enumerate(left) if mask >> at & 1] for mask in range(2 ** len(left)))

        def is_in(words: list[str]) -> bool:
            rest = iter(right)
            return all(word in rest for word in words)

        return max(len(words) for words in chosen if is_in(words))

    got = rouge_l_recall([" ".join(left) for left, _ in pairs], [" ".join(right) for _, right in pairs])
    assert got.tolist() == [longest(left, right) / len(right) for left, right in pairs]


def test_rouge_l_recall_keeps_the_order_and_wants_a_reference_each() -> None:
    assert rouge_l_recall(["b", "a b", "c"], ["a b", "a b", "a b"]).tolist() == [0.5, 1.0, 0.0]
    assert rouge_l_recall([], []).shape == (0,)
    with pytest.raises(ValueError, match="zip"):
        rouge_l_recall(["a"], [])
