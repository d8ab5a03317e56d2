"""A causal language model as a module that gives logits at chosen positions, so that those of a whole batch are never made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


class LanguageModel(nn.Module):
    """A causal language model that gives logits at chosen positions only; its parameters' names begin with `net.`.

    The output head is applied to the chosen positions alone, so logits of prompts and padding are never made. A model that
    does more than that to its logits (a cap, a scale) is found out when it is wrapped, and gives them all at first
    (`uses_whole_logits`).
    """

    def __init__(self, net: PreTrainedModel | PeftModel, *, is_fresh_adapter: bool = False, saves_base: bool = False) -> None:
        """Wrap a model.

        Args:
            net: of transformers, or of peft.
            is_fresh_adapter: whether its adapter is new, so that half of it is zero.
            saves_base: whether the frozen base is written into the folder of the adapter.
        """
        super().__init__()
        self.net = net
        self.is_adapter = isinstance(net, PeftModel)
        self.is_fresh_adapter, self.saves_base = is_fresh_adapter, saves_base
        self.max_length = context_of(self.base.config)
        """Longest row in tokens; None: any."""
        self.vocabulary, self.uses_whole_logits = _probe(self)
        """Number of columns of the logits."""

    def forward(self, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
        """Return the logits (m, vocabulary) at positions of a batch.

        Args:
            ids: (n, t) int64.
            mask: (n, t) int64, 0 where padding is.
            where: (m,) int64, row * t + position; the logits there predict the token after it.
        """
        return self._head(self._states(ids, mask)[where])

    def chunks(self, ids: Tensor, mask: Tensor, where: Tensor, *, n_labels: int) -> Iterator[Tensor]:
        """Yield the logits of `forward`, `n_labels` rows at a time; the decoder runs once.

        Args:
            ids, mask, where: as for `forward`.
            n_labels: rows of each piece but the last, at least 1.
        """
        states = self._states(ids, mask)
        for part in where.split(n_labels):
            yield self._head(states[part])

    @property
    def base(self) -> PreTrainedModel:
        """The model of transformers, under the adapter where there is one."""
        return cast(PreTrainedModel, self.net.get_base_model() if isinstance(self.net, PeftModel) else self.net)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What `_head` makes logits of, (n * t, any): hidden states, or the logits where those are needed whole."""
        if self.uses_whole_logits:
            states = self.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
        else:
            states = _decoder(self.base)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return cast(Tensor, states).flatten(0, 1)

    def _head(self, states: Tensor) -> Tensor:
        return states if self.uses_whole_logits else cast(Tensor, self.base.get_output_embeddings()(states))


def context_of(config: Any) -> int | None:
    """Return the longest row in tokens that a configuration of transformers says; None: it says none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def embedding_of(base: PreTrainedModel) -> Tensor:
    """Return the weights (rows, width) of the input embedding."""
    return cast(Tensor, base.get_input_embeddings().weight)


def _decoder(base: PreTrainedModel) -> nn.Module:
    return base.base_model


def _probe(model: LanguageModel) -> tuple[int, bool]:
    """Find the width of the logits, and whether they are not simply the head's of the decoder's last hidden state.

    The whole forward pass is run once with that state replaced by a large one, since a cap hardly shows in small logits.
    """
    base = model.base
    head, decoder = base.get_output_embeddings(), _decoder(base)
    device = embedding_of(base).device
    if device.type == "meta":
        return int(base.config.get_text_config().vocab_size), head is None
    ids = torch.tensor([[0, 1, 0]], device=device)
    mask = torch.ones_like(ids)
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, given: Any, output: Any) -> Any:
        seen.append(output.last_hidden_state)
        output.last_hidden_state = large
        return output

    def width() -> int:
        return int(model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits.shape[-1])

    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            if head is None or decoder is base:
                return width(), True
            states = getattr(decoder(input_ids=ids, attention_mask=mask, use_cache=False), "last_hidden_state", None)
            if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:  # a decoder of another form
                return width(), True
            large = states * (1e3 / head(states).abs().max().clamp(min=1e-30)).to(states.dtype)
            handle = decoder.register_forward_hook(enlarge)
            try:
                whole = model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
            finally:
                handle.remove()
            # Room for the rounding of one matrix product in either type; caps and scales in use change logits by far more.
            room = 2e-2 if states.dtype in (torch.bfloat16, torch.float16) else 1e-3
            alone = head(large)
            is_same = len(seen) == 1 and bool(
                (alone - whole).abs().max() <= room * alone.abs().max()
                and (seen[0] - states).abs().max() <= room * states.abs().max()
            )
            return int(whole.shape[-1]), not is_same
    finally:
        for module in was_training:
            module.training = True
