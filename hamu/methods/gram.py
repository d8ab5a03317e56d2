"""Inner products of a gradient pair, per block, and the flat buffers that make them cheap.

Every combine rule needs three numbers per block: ||g_r||^2, ||g_f||^2 and kappa = <g_r, g_f>. Both gradients are kept in flat
buffers whose blocks are padded with zeros to whole rows of `ROW` elements. One batched product then gives the 2x2 Gram of every
row, and one `index_add` sums rows to blocks: a handful of operations and one host read a step, however many tensors there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

ROW = 256
"""Elements a row: short enough that BatchNorm's small tensors waste little, long enough to keep the number of rows down."""

SLAB_ROWS = 1 << 16
"""Rows whose float64 copies exist at one time (256 MiB): bounds the extra memory on models of any size."""

COARSE_SIN2 = 1e-3
"""sin^2 of the angle below which Grams summed in the gradients' own precision are not trusted: float32 sums of 256 products are
good to about 1e-7 of ||g_r|| ||g_f||, so a sin^2 of 1e-3 to 1e-4 of itself."""


@dataclass(frozen=True)
class Grams:
    """Inner products of a gradient pair, one entry per block, float64.

    retain: ||g_r||^2, shape (n_blocks,). forget: ||g_f||^2. cross: kappa = <g_r, g_f>.
    """

    retain: np.ndarray
    forget: np.ndarray
    cross: np.ndarray

    @cached_property
    def retain_norm(self) -> np.ndarray:
        """||g_r|| per block, shape (n_blocks,)."""
        return np.sqrt(self.retain)

    @cached_property
    def forget_norm(self) -> np.ndarray:
        """||g_f|| per block, shape (n_blocks,)."""
        return np.sqrt(self.forget)

    @cached_property
    def sin2(self) -> np.ndarray:
        """sin^2 of the angle between g_r and g_f, shape (n_blocks,); 0 where either is zero."""
        product = self.retain * self.forget
        ratio = np.divide(product - self.cross**2, product, out=np.zeros_like(product), where=product != 0)
        return np.minimum(np.maximum(ratio, 0.0), 1.0)

    @property
    def is_finite(self) -> bool:
        """Whether no gradient holds a NaN or an infinity (either would show in its own norm)."""
        return math.isfinite(float(np.add.reduce(self.retain) + np.add.reduce(self.forget)))

    @property
    def is_nearly_colinear(self) -> bool:
        """Whether the angle in some block is so small that it takes Grams computed in float64 throughout."""
        return bool(((self.sin2 < COARSE_SIN2) & (self.cross != 0)).any())

    def total(self) -> Grams:
        """Grams of the whole model as one block: inner products of concatenated vectors are sums over blocks."""
        return Grams(*(np.asarray([part.sum()]) for part in (self.retain, self.forget, self.cross)))

    def swapped(self) -> Grams:
        """Grams of the pair (-g_f, -g_r), in which HAMU-U is HAMU-Q; kappa is unchanged."""
        return Grams(retain=self.forget, forget=self.retain, cross=self.cross)

    def scaled(self, retain: float, forget: float) -> Grams:
        """Grams after g_r and g_f are multiplied by the given factors: this is what clipping does to them."""
        scaled = Grams(self.retain * retain**2, self.forget * forget**2, self.cross * (retain * forget))
        if retain > 0 and forget > 0:
            scaled.__dict__["sin2"] = self.sin2  # an angle does not depend on lengths: computed once a step
        return scaled


def clip_factors(grams: Grams, max_grad_norm: float | None) -> tuple[float, float]:
    """Give the factors that clip g_r and g_f, each over the whole model, to `max_grad_norm`.

    min(1, M / (||g|| + 1e-6)), the form of `torch.nn.utils.clip_grad_norm_`. None or 0 clips nothing.
    """
    if not max_grad_norm:
        return 1.0, 1.0
    retain, forget = (min(1.0, max_grad_norm / (math.sqrt(part.sum()) + 1e-6)) for part in (grams.retain, grams.forget))
    return retain, forget


def unscaled_clip(grams: Grams, max_grad_norm: float | None, loss_scale: float) -> tuple[float, float]:
    """Give the factors that clip g_r and g_f of a pair whose losses were scaled, and take that scale out of them."""
    unscale = 1 / loss_scale
    retain, forget = clip_factors(grams if unscale == 1 else grams.scaled(unscale, unscale), max_grad_norm)
    return retain * unscale, forget * unscale


class BlockLayout:
    """Where each tensor of a model lies in a flat buffer of rows, and what is done on whole buffers.

    Args:
        tensors: one per block, any shapes; only shapes and strides are kept. Dense tensors keep their memory order in a view, so
            channels-last weights get channels-last gradients.
        device: where the buffers live.
        n_shards: equal ranges of rows that a buffer is cut into, one for each of several processes; rows of zeros, counted to
            the last block, make the number of rows a multiple of it.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device | str | None = None, *, n_shards: int = 1) -> None:
        self.device = torch.device(device if device is not None else tensors[0].device)
        self.n_blocks, self.n_shards = len(tensors), n_shards
        rows = [-(-tensor.numel() // ROW) for tensor in tensors]
        rows[-1] += -sum(rows) % n_shards
        starts = np.concatenate([[0], np.cumsum(rows)])
        self.n_rows = int(starts[-1])
        self._places = [
            (tensor.size(), _dense_strides(tensor), int(start) * ROW) for tensor, start in zip(tensors, starts[:-1], strict=True)
        ]
        self._block_of_row_host = np.repeat(np.arange(self.n_blocks), rows)
        self._block_of_row = torch.from_numpy(self._block_of_row_host).to(self.device)

    @property
    def n_elements(self) -> int:
        """Elements of a flat buffer, padding included."""
        return self.n_rows * ROW

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Make the buffers of a gradient pair, zeros, shape (2, n_elements): row 0 for g_r, row 1 for g_f."""
        return torch.zeros(2, self.n_elements, dtype=dtype, device=self.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Give one view per block into one row of the buffers, in the blocks' shapes."""
        base = buffer.storage_offset()
        return [buffer.as_strided(size, stride, base + start) for size, stride, start in self._places]

    @torch.no_grad()
    def flatten(self, retain: Sequence[Tensor], forget: Sequence[Tensor]) -> Tensor:
        """Copy two lists of tensors, one tensor per block, into new buffers of their widest dtype, float32 at least."""
        dtype = torch.float32  # a step is lr times smaller than a gradient: half precision would lose it
        for tensor in (*retain, *forget):
            dtype = torch.promote_types(dtype, tensor.dtype)
        pair = self.zeros(dtype)
        for buffer, tensors in zip(pair, (retain, forget), strict=True):
            torch._foreach_copy_(self.views(buffer), list(tensors))
        return pair

    def gram_sums(self, pair: Tensor, *, precise: bool = True, shard: int = 0) -> Tensor:
        """Compute the 2x2 Gram of each block on the device: shape (n_blocks, 2, 2), float64. No host read.

        Args:
            pair: the buffers, shape (2, n_elements), or one shard of them, shape (2, n_elements / n_shards).
            precise: multiply and sum in float64; otherwise only the sums over rows are float64 and nothing is copied (half
                precision is multiplied in float32).
            shard: which shard `pair` is, where it is one: the sums are then its part of the Grams.
        """
        sums = torch.zeros(self.n_blocks, 2, 2, dtype=torch.float64, device=self.device)
        rows = pair.view(2, -1, ROW).transpose(0, 1)
        blocks = self._block_of_row[self._rows_of(shard, len(rows))]
        for start in range(0, len(rows), SLAB_ROWS):
            slab = rows[start : start + SLAB_ROWS]
            if precise:
                slab = slab.double()
            elif slab.dtype.itemsize < 4:
                slab = slab.float()
            sums.index_add_(0, blocks[start : start + SLAB_ROWS], torch.bmm(slab, slab.transpose(1, 2)).double())
        return sums

    def grams(self, pair: Tensor) -> Grams:
        """Compute the Grams of a pair in float64; this reads the device once."""
        return grams_of_sums(self.gram_sums(pair).cpu().numpy())

    def combine_(self, pair: Tensor, weights: np.ndarray, *, shard: int = 0) -> Tensor:
        """Overwrite row 0 of the buffers, or of a shard of them, with w_r g_r + w_f g_f and return it.

        weights: shape (n_blocks, 2). pair, shard: as in `gram_sums`.
        """
        retain, forget = pair.view(2, -1, ROW)
        blocks = self._block_of_row_host[self._rows_of(shard, len(retain))]
        # Not blocking: a copy to a GPU that does would make the host wait for all the work before it.
        of_row = torch.from_numpy(weights[blocks]).to(self.device, non_blocking=True).to(pair.dtype)
        retain.mul_(of_row[:, :1]).addcmul_(forget, of_row[:, 1:])
        return pair[0]

    def _rows_of(self, shard: int, n_rows: int) -> slice:
        assert n_rows in (self.n_rows, self.n_rows // self.n_shards), "a pair is whole, or one shard"
        return slice(shard * n_rows, (shard + 1) * n_rows)


def grams_of_sums(sums: np.ndarray) -> Grams:
    """Name the entries of the summed 2x2 products, shape (n_blocks, 2, 2)."""
    return Grams(retain=sums[:, 0, 0], forget=sums[:, 1, 1], cross=sums[:, 0, 1])


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()  # preserves the order of dense tensors, packs the others
