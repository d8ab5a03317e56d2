"""Language models by name and folder: round trips through our loader and the plain libraries, logits, LoRA, refusals."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    ResNetConfig,
    ResNetForImageClassification,
)

from hamu.errors import CheckpointError, ConfigError
from hamu.models import loading
from hamu.models.language import (
    TINY,
    LanguageModel,
    LoraSettings,
    build_language_model,
    context_length,
    load_language_model,
    load_tokenizer,
    save_language_model,
    train_tokenizer,
)
from hamu.models.tokens import TextBatch, encode_rows, pad_id_of

pytestmark = pytest.mark.slow

TEXTS = ["Who is Kamori Venda?", "Kamori Venda is a poet from Tensalu.", "Where was she born?", "In the spring of 1932."]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gpt_neox": (GPTNeoXConfig, {**SMALL, "max_position_embeddings": 64}),
    "qwen2": (Qwen2Config, {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64}),
    "gemma2": (Gemma2Config, {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def batch(tokenizer: PreTrainedTokenizerBase) -> TextBatch:
    """Rows of three lengths, one of them a plain text."""
    packed = encode_rows(tokenizer, [TEXTS[0], TEXTS[2], ""], [TEXTS[1], TEXTS[3], TEXTS[3]], max_length=None)
    return packed.batch(torch.arange(3), pad_id=pad_id_of(tokenizer))


@pytest.fixture(scope="module")
def hub_folders(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each kind, in a folder as the hub has them."""
    folders = {}
    for name, (kind, settings) in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = kind(vocab_size=len(tokenizer) + 3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(str(folders[name]))
    return folders


def tiny(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> LanguageModel:
    return build_language_model(TINY, tokenizer=tokenizer, **({"seed": 1} | settings))


def logits(model: nn.Module, batch: TextBatch) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch.ids, batch.mask, batch.where)


def whole_logits(net: nn.Module, batch: TextBatch) -> Tensor:
    with torch.no_grad():
        return net.eval()(input_ids=batch.ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.where]


def change_trained(model: nn.Module) -> None:
    """Move what is trained, so that a new adapter is no longer zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def files_in(folder: Path) -> Iterator[str]:
    return (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_tokenizer_is_the_same_whatever_the_order_of_the_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["ka", "mori", "venda", "was", "1932", "in", "Ténsalu"], k=9)) for _ in range(300)]

    def digest(order: list[str]) -> str:
        return hashlib.sha256(train_tokenizer(order).backend_tokenizer.to_str().encode()).hexdigest()

    first = digest(texts)
    assert {digest(texts[::-1]), digest(rng.sample(texts, 300)), digest([*texts, *texts[:50], ""])} == {first}
    assert first != digest(texts[:200])
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


def test_tiny_llama_has_about_a_million_parameters_and_depends_on_the_seed_alone(
    tokenizer: PreTrainedTokenizerBase, batch: TextBatch
) -> None:
    state = torch.random.get_rng_state()
    model, same, other = tiny(tokenizer), tiny(tokenizer), tiny(tokenizer, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(model, batch), logits(same, batch))
    assert not torch.equal(logits(model, batch), logits(other, batch))
    layers = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name)
    assert 0.7e6 < layers < 0.9e6  # the embedding and the head bring at most 2 * 2048 * 128 = 0.52e6 more
    assert model.vocabulary == len(tokenizer) and model.max_length == 1024 and not model.uses_whole_logits
    assert not model.is_adapter and not model.is_fresh_adapter
    assert all(name.startswith("net.") for name in model.state_dict())


@pytest.mark.parametrize("name", [*CONFIGS])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_models_in_the_hubs_format_load_and_give_their_own_logits(
    name: str, lora: LoraSettings | None, hub_folders: dict[str, Path], batch: TextBatch
) -> None:
    folder = hub_folders[name]
    loaded = load_tokenizer(folder)
    model = build_language_model(folder, tokenizer=loaded, seed=0, lora=lora)
    if lora:
        change_trained(model)
    expected = whole_logits(model.net, batch)
    # One matrix product over fewer rows: float32 rounding, on logits below 1.
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    if lora is None:
        plain = whole_logits(AutoModelForCausalLM.from_pretrained(folder), batch)
        torch.testing.assert_close(expected, plain, atol=0, rtol=0)
    assert model.uses_whole_logits is (name == "gemma2")  # which caps its logits
    assert model.vocabulary == expected.shape[1] and model.max_length == context_length(folder) == 64
    pieces = list(model.chunks(batch.ids, batch.mask, batch.where, n_labels=5))
    assert [len(piece) for piece in pieces[:-1]] == [5] * (len(pieces) - 1)
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=1e-5)


def test_a_cap_is_found_though_it_hardly_shows_in_the_logits_of_new_weights(hub_folders: dict[str, Path]) -> None:
    net = AutoModelForCausalLM.from_pretrained(hub_folders["gemma2"])
    assert net.config.final_logit_softcapping == 30.0
    assert LanguageModel(net).uses_whole_logits
    net.config.final_logit_softcapping = None
    assert not LanguageModel(net).uses_whole_logits


def test_padding_does_not_change_a_rows_logits(tokenizer: PreTrainedTokenizerBase, batch: TextBatch) -> None:
    model = tiny(tokenizer)
    packed = encode_rows(tokenizer, [TEXTS[0], TEXTS[2], ""], [TEXTS[1], TEXTS[3], TEXTS[3]], max_length=None)
    together = logits(model, batch)
    for row in range(3):
        alone = packed.batch(torch.tensor([row]), pad_id=0)
        # Attention sums in another order when rows are padded.
        torch.testing.assert_close(together[batch.row_of == row], logits(model, alone), atol=1e-4, rtol=1e-4)


def test_full_model_comes_back_by_our_loader_and_by_transformers(
    tokenizer: PreTrainedTokenizerBase, batch: TextBatch, tmp_path: Path
) -> None:
    model = tiny(tokenizer)
    save_language_model(model, tokenizer, tmp_path, {"seed": 1, "loss": float("nan")})
    expected = logits(model, batch)
    again = load_language_model(tmp_path)
    assert torch.equal(logits(again, batch), expected)
    assert torch.equal(whole_logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch), whole_logits(model.net, batch))
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)
    assert trained_names(again) == [name for name, _ in again.named_parameters()]
    assert json.loads((tmp_path / "record.json").read_text()) == {"seed": 1, "loss": None}
    assert not [name for name in files_in(tmp_path) if name.endswith((".bin", ".pt", ".md"))]


@pytest.mark.parametrize("name", ["default", "mine"])
def test_adapter_comes_back_by_our_loader_and_by_peft(
    name: str, tokenizer: PreTrainedTokenizerBase, batch: TextBatch, tmp_path: Path
) -> None:
    model = tiny(tokenizer, lora=LoraSettings(r=4, alpha=32, targets="q_proj, v_proj", name=name))
    change_trained(model)
    save_language_model(model, tokenizer, tmp_path / "a", {})
    expected = logits(model, batch)
    again = load_language_model(tmp_path / "a", lora=LoraSettings(r=1))
    assert torch.equal(logits(again, batch), expected)
    assert again.is_adapter and not again.is_fresh_adapter
    settings = again.net.peft_config["default"]
    assert (settings.r, settings.lora_alpha, set(settings.target_modules)) == (4, 32, {"q_proj", "v_proj"})
    assert all("lora_" in each for each in trained_names(again)) and len(trained_names(again)) == 2 * 2 * 4
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base"), tmp_path / "a")
    assert torch.equal(whole_logits(plain, batch), whole_logits(model.net, batch))
    assert len(load_tokenizer(tmp_path / "a")) == len(tokenizer)
    assert context_length(tmp_path / "a") == 1024
    # The next folder stands alone too.
    change_trained(again)
    save_language_model(again, tokenizer, tmp_path / "b", {})
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert torch.equal(logits(load_language_model(tmp_path / "b"), batch), logits(again, batch))
    assert not [each for each in files_in(tmp_path / "b") if each.endswith((".bin", ".pt", ".md"))]


def test_adapter_on_a_folder_names_it_as_its_base_and_holds_no_copy(
    tokenizer: PreTrainedTokenizerBase,
    batch: TextBatch,
    hub_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = hub_folders["qwen2"]
    monkeypatch.chdir(base.parent)
    model = load_language_model(base.name, lora=LoraSettings())  # a relative path
    assert model.is_adapter and model.is_fresh_adapter
    assert torch.equal(logits(model, batch), logits(load_language_model(base), batch))  # half of it is zero
    change_trained(model)
    save_language_model(model, tokenizer, tmp_path / "a", {})
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "a" / "base").exists()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert torch.equal(logits(load_language_model(tmp_path / "a"), batch), logits(model, batch))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / file).unlink()
    assert load_tokenizer(tmp_path / "a").get_vocab() == load_tokenizer(base).get_vocab()
    continued = build_language_model(tmp_path / "a", tokenizer=tokenizer, seed=0, lora=LoraSettings())
    assert not continued.is_fresh_adapter


def test_published_adapter_in_a_folder_of_its_name_loads(hub_folders: dict[str, Path], batch: TextBatch, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(hub_folders["llama"])
    net = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"]), adapter_name="tofu")
    change_trained(net)
    net.save_pretrained(tmp_path)
    assert (tmp_path / "tofu" / "adapter_config.json").is_file()
    model = load_language_model(tmp_path)
    torch.testing.assert_close(logits(model, batch), whole_logits(net, batch), atol=1e-5, rtol=1e-5)
    assert load_tokenizer(tmp_path).pad_token_id == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"several adapters \(other, tofu\)"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_model_whose_head_is_its_embedding_saves_loads_and_has_a_frozen_copy(
    lora: LoraSettings | None,
    hub_folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    batch: TextBatch,
    tmp_path: Path,
) -> None:
    model = load_language_model(hub_folders["qwen2"], lora=lora)
    assert model.base.get_output_embeddings().weight is model.base.get_input_embeddings().weight
    model.saves_base = lora is not None
    change_trained(model)
    before = logits(model, batch)
    save_language_model(model, tokenizer, tmp_path, {})
    assert torch.equal(logits(load_language_model(tmp_path), batch), before)
    original = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    change_trained(model)
    with torch.no_grad():
        frozen = torch.func.functional_call(model, original, (batch.ids, batch.mask, batch.where))
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_frozen_copy_of_what_is_trained_gives_the_original_logits(
    lora: LoraSettings | None, tokenizer: PreTrainedTokenizerBase, batch: TextBatch
) -> None:
    model = tiny(tokenizer, lora=lora)
    change_trained(model)
    original = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    before = logits(model, batch)
    change_trained(model)
    assert not torch.equal(logits(model, batch), before)
    with torch.no_grad():
        frozen = torch.func.functional_call(model, original, (batch.ids, batch.mask, batch.where))
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_gradient_checkpointing_gives_the_same_gradients(
    lora: LoraSettings | None, tokenizer: PreTrainedTokenizerBase, batch: TextBatch
) -> None:
    gradients, saved = [], []
    for is_on in (False, True):
        model = tiny(tokenizer, lora=lora, gradient_checkpointing=is_on)
        change_trained(model)
        model.train()
        n_kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal n_kept
            n_kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(model(batch.ids, batch.mask, batch.where), batch.labels)
        saved.append(n_kept)
        gradients.append(torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad]))
    assert saved[1] < saved[0] / 2
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_bf16_holds_a_frozen_base_in_bfloat16_and_trains_in_float32(
    tokenizer: PreTrainedTokenizerBase, batch: TextBatch, tmp_path: Path
) -> None:
    full = tiny(tokenizer, bf16=True)
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}
    model = tiny(tokenizer, bf16=True, lora=LoraSettings())
    save_language_model(model, tokenizer, tmp_path, {})
    for each in (model, load_language_model(tmp_path, bf16=True)):
        types = {(parameter.requires_grad, parameter.dtype) for parameter in each.parameters()}
        assert types == {(True, torch.float32), (False, torch.bfloat16)}
    loss = nn.functional.cross_entropy(model(batch.ids, batch.mask, batch.where).float(), batch.labels)
    loss.backward()
    assert loss.isfinite() and any(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_adapter_that_trains_whole_modules_comes_back(
    tokenizer: PreTrainedTokenizerBase, batch: TextBatch, tmp_path: Path
) -> None:
    net = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SMALL))
    adapted = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["lm_head"]))
    model = LanguageModel(adapted, saves_base=True)
    change_trained(model)
    save_language_model(model, tokenizer, tmp_path, {})
    again = load_language_model(tmp_path, bf16=True)
    assert any("lm_head" in name for name in trained_names(again))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_saving_the_other_kind_into_a_folder_replaces_it(
    tokenizer: PreTrainedTokenizerBase, batch: TextBatch, tmp_path: Path
) -> None:
    full, adapter = tiny(tokenizer), tiny(tokenizer, lora=LoraSettings(), seed=2)
    for model in (full, adapter, full):
        save_language_model(model, tokenizer, tmp_path, {})
        assert torch.equal(logits(load_language_model(tmp_path), batch), logits(model, batch))


def test_bad_folders_and_names_are_one_clear_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])).save_pretrained(
        tmp_path / "images"
    )
    save_language_model(tiny(tokenizer), tokenizer, tmp_path / "cut", {})
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    for name in ("missing", "empty", "images", "cut"):
        with pytest.raises(CheckpointError) as error:
            load_language_model(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    with pytest.raises(ConfigError, match="unknown model 'tiny-lama'.*tiny-llama"):
        build_language_model("tiny-lama", tokenizer=tokenizer, seed=0)
    with pytest.raises(ConfigError, match="brings no tokenizer"):
        load_tokenizer(TINY)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_bad_adapter_folders_are_one_clear_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_language_model(tiny(tokenizer, lora=LoraSettings()), tokenizer, tmp_path / "a", {})
    file = tmp_path / "a" / "adapter_config.json"
    good = json.loads(file.read_text())
    for bad, word in (
        (good | {"peft_type": "PREFIX_TUNING"}, "only LoRA"),
        ([], "cannot read"),
        (good | {"r": 4}, "cannot load the adapter"),
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=word) as error:
            load_language_model(tmp_path / "a")
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(good))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_language_model(tmp_path / "a")
    (tmp_path / "a" / "base").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="does not say its base"):
        load_language_model(tmp_path / "a")


def test_tokenizer_with_more_tokens_than_the_embedding_is_refused(hub_folders: dict[str, Path]) -> None:
    larger = train_tokenizer([*TEXTS, "many other words than those of the model"])
    with pytest.raises(ConfigError, match=r"tokenizer has \d+ tokens, but the embedding of .* has \d+ rows"):
        build_language_model(hub_folders["llama"], tokenizer=larger, seed=0)


def test_lora_settings_out_of_range_and_unknown_targets_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for bad in ({"r": 0}, {"dropout": 1.0}, {"name": "a.b"}, {"name": ""}, {"targets": " , "}):
        with pytest.raises(ConfigError):
            LoraSettings(**bad)
    with pytest.raises(ConfigError, match="'c_attn'.*q_proj"):
        tiny(tokenizer, lora=LoraSettings(targets="c_attn"))
    state = torch.random.get_rng_state()
    tiny(tokenizer, lora=LoraSettings())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_context_is_the_smaller_of_model_and_tokenizer(tokenizer: PreTrainedTokenizerBase, hub_folders: dict[str, Path]) -> None:
    assert context_length(TINY) == 1024
    assert context_length(hub_folders["gpt2"], tokenizer=tokenizer) == 64
    short = train_tokenizer(TEXTS)
    short.model_max_length = 32
    assert context_length(hub_folders["gpt2"], tokenizer=short) == 32


def test_gated_model_asks_for_licence_and_login_without_showing_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str, **settings: Any) -> None:
        raise OSError("You are trying to access a gated repo.\n403 Client Error, token hf_abcdefghijk")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "why_not_on_hub", lambda name, kind, revision: None)
    with pytest.raises(CheckpointError, match=r"accept its licence at https://huggingface\.co/meta/llama and log in") as error:
        load_tokenizer("meta/llama")
    assert "hf_abc" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(loading, "why_not_on_hub", lambda name, kind, revision: "ConnectError: no network")
    with pytest.raises(CheckpointError, match=r"no network.*fetch the model first"):
        context_length("meta/llama")


def test_revision_is_asked_of_the_hub_and_not_of_folders(monkeypatch: pytest.MonkeyPatch, hub_folders: dict[str, Path]) -> None:
    asked: list[dict[str, Any]] = []

    def from_pretrained(name: str, **settings: Any) -> None:
        asked.append(settings)
        raise OSError("not in the cache")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "why_not_on_hub", lambda name, kind, revision: None)
    tokenizer = load_tokenizer(hub_folders["gpt2"], revision="not read")
    for name in ("owner/model", hub_folders["gpt2"]):
        with pytest.raises(CheckpointError, match="not in the cache"):
            build_language_model(name, tokenizer=tokenizer, seed=0, revision="abc123")
    assert [settings.get("revision") for settings in asked] == ["abc123", "abc123", None]  # the cache, the hub; the folder
    assert [settings.get("local_files_only", False) for settings in asked] == [True, False, True]
    assert all(settings["use_safetensors"] and settings["trust_remote_code"] is False for settings in asked)
