"""Questions and answers, or plain texts: rows tokenised once, and a causal language model, whole or with a LoRA adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hamu.data.splits import ForgetSet
from hamu.data.texts import TextData, sha256_texts
from hamu.errors import ConfigError, DataError, unknown
from hamu.models.adapters import check_same_adapter
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
from hamu.models.tokens import PackedRows, TextBatch, encode_rows, pad_id_of
from hamu.scores import CHUNK_ELEMENTS, mean_by_row, min_k_by_row, token_scores
from hamu.tasks.base import SPLITS, RowScores
from hamu.tasks.tofu import write_truth_ratios

if TYPE_CHECKING:
    from hamu.training.config import TrainConfig

logger = logging.getLogger(__name__)

MAX_LENGTH = 1024
"""Longest row in tokens where none is given; a model's context may be shorter."""

_LONGER, _FEW = 1.25, 8
_DRAWS = 16


class TextTask:
    """Rows of texts, tokenised, and a causal language model for them. Labels are the tokens of the answers.

    Training takes the mean loss over the labels of a step; evaluation the mean over rows of each row's mean.
    """

    can_compile = False  # every batch has a length of its own

    def __init__(
        self,
        data: TextData,
        *,
        tokenizer: Any,
        model_name: str = TINY,
        model_revision: str | None = None,
        lora: LoraSettings | None = None,
        bf16: bool = False,
        gradient_checkpointing: bool = False,
        chat: bool | None = None,
        max_length: int = MAX_LENGTH,
        device: str | torch.device = "cpu",
        k_pct: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Tokenise the rows.

        Args:
            data: prompts and responses.
            tokenizer: of the model.
            model_name, model_revision, lora, bf16, gradient_checkpointing: as `build_language_model`.
            chat: as `encode_rows`.
            max_length: longest row in tokens; the prompts of longer ones are cut from the left.
            device: of batches and models.
            k_pct: share of a row's labels that min-k averages, in (0, 1].
            seed: of a new adapter on a whole model that is loaded.

        Raises:
            ConfigError: `k_pct` is out of range.
            DataError: an answer alone is longer than `max_length`, or the chat template drops the answers.
        """
        if not 0.0 < k_pct <= 1.0:
            raise ConfigError(f"k_pct is {k_pct}; it is a share of the labels: give more than 0, at most 1")
        self.name, self.n_classes = data.name, len(tokenizer)
        self.data, self.tokenizer, self.model_name, self.k_pct = data, tokenizer, model_name, k_pct
        self.device = torch.device(device)
        self.pad_id = pad_id_of(tokenizer)
        self.chat, self.max_length = chat, max_length
        self._build: dict[str, Any] = {"lora": lora, "bf16": bf16, "gradient_checkpointing": gradient_checkpointing}
        self._revision, self._seed = model_revision, seed
        n_retain, n_forget = len(data.retain), len(data.forget)
        self.forget_set = ForgetSet(
            forget=np.arange(n_retain, n_retain + n_forget, dtype=np.int64),
            retain=np.arange(n_retain, dtype=np.int64),
            provenance=dict(data.provenance),
            # The numbers of the rows say nothing here, so that the hash is of the rows themselves.
            sha256=sha256_texts(data.forget, data.retain),
        )
        train = data.retain + data.forget
        self._tables = {"train": self.encode(train.prompts, train.responses)}
        self._tables["test"] = self.encode(data.test.prompts, data.test.responses)
        self._rows = {
            "retain": torch.arange(n_retain, device=self.device),
            "forget": torch.arange(n_retain, n_retain + n_forget, device=self.device),
            "train": torch.arange(n_retain + n_forget, device=self.device),
            "test": torch.arange(len(data.test), device=self.device),
        }
        self._lengths = {split: self._table(split).lengths[rows].cpu() for split, rows in self._rows.items()}
        self.n_bytes = sum(table.n_bytes for table in self._tables.values())
        self.n_truncated = sum(table.n_truncated for table in self._tables.values())
        self.extra: Callable[[TextTask, LanguageModel], dict[str, float]] | None = None
        """What `extra_metrics` measures."""
        self.truth_ratios: np.ndarray | None = None
        """Of the forget questions, by the last `extra_metrics`; kept with the model that is saved next."""

    @property
    def has_extra_metrics(self) -> bool:
        """Whether `extra_metrics` has something to measure."""
        return self.extra is not None

    def n_rows(self, split: str) -> int:
        """Return the number of rows in a split of `SPLITS`; 0 for test rows that are not given.

        Raises:
            DataError: there is no such split.
        """
        return len(self._rows_of(split))

    def batch(self, split: str, positions: Tensor) -> TextBatch:
        """Return the rows at the positions (n,) int64, each in [0, n_rows(split)), of a split, padded on the right."""
        rows = self._rows_of(split).index_select(0, positions.to(self.device, non_blocking=True))
        return self._table(split).batch(rows, pad_id=self.pad_id)

    def parts(self, split: str, positions: Tensor, size: int) -> list[Tensor]:
        """Share positions out to passes of rows of similar lengths, so that little of a batch is padding.

        The longest rows come first: memory runs out early or never, and what they leave free is large enough for the others. A
        pass ends before a row that is `_LONGER` times as long as its shortest, if it has `_FEW` rows; a loss is a sum over all
        passes of a step, so that how rows are shared out changes its rounding alone.
        """
        lengths, order = self._lengths[split][positions].sort(stable=True)
        cuts, start = [], 0
        while start < len(lengths):
            n_alike = int(torch.searchsorted(lengths, _LONGER * lengths[start], right=True)) - start
            start += min(size, max(_FEW, n_alike))
            cuts.append(start)
        return list(positions[order].tensor_split(cuts[:-1]))[::-1]

    def probe_rows(self, split: str, n: int) -> Tensor:
        """Return the longest row, n times."""
        return torch.full((n,), int(self._lengths[split].argmax()))

    def n_probes(self, split: str, size: int) -> float:
        """Count the tokens of the largest passes of steps, padding included, in longest rows."""
        lengths, most = self._lengths[split], 0
        generator = torch.Generator().manual_seed(0)
        for _ in range(_DRAWS):
            rows = torch.randperm(len(lengths), generator=generator)[:size]
            most = max([most, *(len(part) * int(lengths[part].max()) for part in self.parts(split, rows, size))])
        return most / int(lengths.max())

    def logits(self, model: Callable[..., Any], batch: TextBatch) -> Tensor:
        """Return the logits (n_labels, vocabulary) of the tokens of the answers, with their graph."""
        return model(batch.ids, batch.mask, batch.where)

    @torch.inference_mode()
    def row_scores(self, model: nn.Module, batch: TextBatch) -> RowScores:
        """Score each row, without a graph; of the logits only a part is held at a time."""
        assert isinstance(model, LanguageModel)
        size = max(1, CHUNK_ELEMENTS // self.n_classes)
        chunks = model.chunks(batch.ids, batch.mask, batch.where, n_labels=size)
        scores = [token_scores(logits, labels) for logits, labels in zip(chunks, batch.labels.split(size), strict=True)]
        logprob, correct, entropy = (
            torch.cat([getattr(part, name) for part in scores]) for name in ("logprob", "correct", "entropy")
        )
        return RowScores(
            loss=-mean_by_row(logprob, batch.row_of, batch.n_rows),
            correct=mean_by_row(correct, batch.row_of, batch.n_rows),
            entropy=mean_by_row(entropy, batch.row_of, batch.n_rows),
            min_k=min_k_by_row(logprob, batch.row_of, batch.n_rows, self.k_pct),
        )

    def losses(self, model: LanguageModel, prompts: Sequence[str], answers: Sequence[str], *, batch_size: int) -> np.ndarray:
        """Return the mean loss (n,) over each answer's tokens, nats, of texts that are no rows of the task."""
        table = self.encode(prompts, answers)
        found = np.empty(len(table))
        model.eval()
        for rows in table.lengths.argsort(stable=True).split(batch_size):
            scores = self.row_scores(model, table.batch(rows, pad_id=self.pad_id))
            found[rows.cpu().numpy()] = scores.loss.cpu().numpy()
        return found

    def extra_metrics(self, model: nn.Module) -> dict[str, float]:
        """Measure what `extra` does: generated answers, and the metrics of TOFU."""
        assert isinstance(model, LanguageModel)
        return {} if self.extra is None else self.extra(self, model)

    def frozen(self, model: nn.Module) -> FrozenModel:
        """Return the model as it is now: a copy of the weights that change, on the same others."""
        return FrozenModel(model)

    def new_model(self, seed: int) -> LanguageModel:
        """Return the model to train from, with a new LoRA adapter if one is asked for."""
        model = build_language_model(self.model_name, tokenizer=self.tokenizer, seed=seed, revision=self._revision, **self._build)
        return model.to(self.device)

    def load_model(self, path: str | Path) -> LanguageModel:
        """Return the model saved in a folder. An adapter is gone on with; to a whole model `lora` gives a new adapter.

        Raises:
            CheckpointError: there is none.
            ConfigError: the tokenizer is not the model's, or LoRA settings are given that its adapter has not.
        """
        model = load_language_model(path, seed=self._seed, **self._build)
        lora: LoraSettings | None = self._build["lora"]
        if lora is not None and model.is_adapter and not model.is_fresh_adapter:
            check_same_adapter(path, lora)
        if model.vocabulary < len(self.tokenizer):
            raise ConfigError(
                f"the model in {str(path)!r} has {model.vocabulary} tokens, but its tokenizer {len(self.tokenizer)}; give the "
                "folder of a model that was saved with its own tokenizer"
            )
        if model.is_fresh_adapter:
            logger.warning(
                "a new LoRA adapter on %s: half of its gradients are zero at first, so S, and with it the largest feasible "
                "constraint ratio, is near 0.05 where a trained adapter has about 1; train the original with --add_lora to go on "
                "with its adapter",
                path,
            )
        return model.to(self.device)

    def save_model(self, model: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
        """Write a folder that transformers or peft reads, with its tokenizer, and `record` in its `record.json`."""
        assert isinstance(model, LanguageModel)
        save_language_model(model, self.tokenizer, path, record)
        if self.truth_ratios is not None:
            write_truth_ratios(path, self.truth_ratios, self.data.perturbed["forget"])
            self.truth_ratios = None

    def facts(self) -> dict[str, Any]:
        """None: a tokenizer comes with its model."""
        return {}

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> PackedRows:
        """Tokenise n prompts and answers as the rows are.

        Raises:
            DataError: as `encode_rows`.
        """
        return encode_rows(self.tokenizer, prompts, answers, max_length=self.max_length, chat=self.chat).to(self.device)

    def _table(self, split: str) -> PackedRows:
        return self._tables["test" if split == "test" else "train"]

    def _rows_of(self, split: str) -> Tensor:
        if split not in self._rows:
            raise DataError(unknown("split", split, SPLITS))
        return self._rows[split]


class FrozenModel:
    """A model as it was when this was made, in evaluation mode: its own copy of the weights that are trained, a LoRA adapter's or
    all, and the model's others."""

    def __init__(self, model: nn.Module) -> None:
        self._live = model
        self._weights = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
        self.weights = list(self._weights.values())
        self.n_bytes = sum(weight.nbytes for weight in self.weights)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the model as it was."""
        was_training = self._live.training
        self._live.eval()
        try:
            return functional_call(self._live, self._weights, inputs)
        finally:
            self._live.train(was_training)


def task_for(
    config: TrainConfig, data: TextData, *, device: str | torch.device = "cpu", start: str | Path | None = None
) -> TextTask:
    """Build the text task of a configuration.

    Args:
        config: the settings.
        data: the rows.
        device: of batches and models.
        start: folder of the model that will be loaded, whose tokenizer is taken; None: that of `model_name`, and of the built-in
            model one made of the rows to train on.

    Raises:
        ConfigError, DataError, CheckpointError: as `TextTask` and `load_tokenizer`.
    """
    name, training = config.run.model_name, config.training
    source = start if start is not None else None if name == TINY else name
    if source is None:
        tokenizer = train_tokenizer([text for rows in (data.retain, data.forget) for text in (*rows.prompts, *rows.responses)])
    else:
        tokenizer = load_tokenizer(source, revision=None if start is not None else config.run.model_revision)
    context = context_length(source or TINY, tokenizer=tokenizer, revision=config.run.model_revision)
    if context is not None and (config.data.max_length or 0) > context:
        raise ConfigError(
            f"max_length is {config.data.max_length}, but model {str(source or TINY)!r} takes {context} tokens; give at most "
            "that, or leave it out"
        )
    lora = LoraSettings(
        r=training.lora_r,
        alpha=training.lora_alpha,
        dropout=training.lora_dropout,
        targets=training.lora_targets,
        name=training.lora_name,
    )
    task = TextTask(
        data,
        tokenizer=tokenizer,
        model_name=name,
        model_revision=config.run.model_revision,
        lora=lora if training.add_lora else None,
        bf16=training.bf16,
        gradient_checkpointing=training.gradient_checkpointing,
        chat=config.data.chat_template,
        max_length=config.data.max_length or min(context or MAX_LENGTH, MAX_LENGTH),
        device=device,
        k_pct=config.data.k_pct,
        seed=config.run.seed,
    )
    if config.logging.eval_tofu or config.logging.eval_generation_rows:
        from hamu.tasks.text_metrics import extra_metrics_of

        task.extra = extra_metrics_of(config, task)
    return task
