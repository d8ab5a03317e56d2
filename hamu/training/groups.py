"""The processes of a run and what they send each other: the only file that knows `torch.distributed`.

Everything goes through `Group.swap`, point-to-point messages in one batch, and is counted there. A step of n processes sends
each gradient once to the owners of its shards and the combined step once back: 2 (n-1)/n of the gradient's bytes a process, as
one all-reduce would, besides the Grams, some kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hamu.methods.gram import BlockLayout, grams_of_sums
from hamu.training.pairs import FORGET, RETAIN, Reading, Wish

_MAX_TEXT = 2000
_COUNT, _LOSS, _STOP, _PAUSE = range(4)
_PARTNER_GONE = ("Connection reset", "Connection closed", "Connection refused", "remote process exited")
_INT_OF_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Group:
    """The processes of one run, numbered from 0 (ranks). Every method that sends is called by all of them, in the same order.

    Args:
        rank, size: which of how many this process is.
        device: where its tensors live.
    """

    def __init__(self, *, rank: int, size: int, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.n_sent_bytes = 0
        """Bytes that this process has handed to the network so far."""
        # gloo moves host memory only.
        self._is_staged = size > 1 and self.device.type != "cpu" and dist.get_backend() == "gloo"

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Group:
        """One process, which sends nothing."""
        return cls(rank=0, size=1, device=device)

    @classmethod
    def current(cls, device: torch.device | str) -> Group:
        """The default process group, which Ray Train, torchrun or a test has set up."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes records, checkpoints and models."""
        return self.rank == 0

    def swap(self, outgoing: Sequence[tuple[Tensor, int]], incoming: Sequence[tuple[Tensor, int]]) -> None:
        """Send tensors to ranks and receive into tensors from ranks, all at once.

        Messages between two ranks arrive in the order sent. Empty ones are not sent.

        Raises:
            RuntimeError: another process is gone, or has not answered within the process group's timeout.
        """
        landing = [(torch.empty_like(tensor, device="cpu") if self._is_staged else tensor, rank) for tensor, rank in incoming]
        sends = [
            dist.P2POp(dist.isend, tensor.cpu() if self._is_staged else tensor, rank) for tensor, rank in outgoing if len(tensor)
        ]
        receives = [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in landing if len(tensor)]
        self.n_sent_bytes += sum(op.tensor.nbytes for op in sends)
        if sends or receives:
            for work in dist.batch_isend_irecv([*sends, *receives]):
                work.wait()
        if self._is_staged:
            for (tensor, _), (landed, _) in zip(incoming, landing, strict=True):
                tensor.copy_(landed)

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def gather_numbers(self, values: Tensor) -> Tensor:
        """Give every process the numbers of all: (m,) on the group's device -> (size, m), the same bits everywhere."""
        return torch.stack(self.gather_rows(values, [len(values)] * self.size))

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Give every process the rows of all, by rank: (counts[rank], ...) each."""
        gathered = [rows if rank == self.rank else rows.new_empty(count, *rows.shape[1:]) for rank, count in enumerate(counts)]
        self.swap([(rows, rank) for rank in self.others], [(gathered[rank], rank) for rank in self.others])
        return gathered

    def gather_texts(self, text: str) -> list[str]:
        """Give every process the texts of all, by rank, each cut to 2000 bytes."""
        padded = text.encode()[:_MAX_TEXT].ljust(_MAX_TEXT, b"\0")
        rows = self.gather_numbers(torch.tensor(list(padded), dtype=torch.uint8, device=self.device))
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows.cpu().numpy()]

    def first(self, number: float) -> float:
        """Give every process the number of rank 0."""
        return float(self.gather_numbers(torch.tensor([number], dtype=torch.float64, device=self.device))[0])

    def any(self, flag: bool) -> bool:
        """Tell every process whether some process has the flag set."""
        return bool(self.gather_numbers(torch.tensor([flag], dtype=torch.uint8, device=self.device)).any())

    def have_same_bits(self, tensors: Sequence[Tensor]) -> bool:
        """Tell every process whether all hold the same tensors, to the bit (by a 64-bit sum of weighted bit patterns)."""
        return bool((fingerprints := self.gather_numbers(fingerprint(tensors, self.device))).eq(fingerprints[0]).all())


class SplitPair:
    """A gradient pair over 2k processes: each computes one role on its rows, and owns one shard of both gradients.

    As `GradientPair` says. A role's gradient is the mean over all labels of that role: each process's mean counts by its number
    of labels, which may be none.

    Args:
        params: one a block, equal on all processes.
        group: the processes.
        roles: role of each rank.
    """

    def __init__(self, params: Sequence[Tensor], group: Group, roles: Sequence[int]) -> None:
        self.layout = BlockLayout(params, n_shards=group.size)
        self._group, self._role = group, roles[group.rank]
        self._ranks = [[rank for rank, role in enumerate(roles) if role == wanted] for wanted in (RETAIN, FORGET)]
        self._index = [torch.tensor(ranks, dtype=torch.int64, device=self.layout.device) for ranks in self._ranks]
        shard_elements = self.layout.n_elements // group.size
        self._buffer = torch.zeros(group.size, shard_elements, dtype=params[0].dtype, device=self.layout.device)
        self._received = torch.zeros_like(self._buffer)
        self._headers = torch.zeros(group.size, 4, dtype=torch.float64, device=self.layout.device)
        self._views = self.layout.views(self._buffer.view(-1))
        wide = torch.promote_types(params[0].dtype, torch.float32)  # half precision is for the wire, not for sums
        # Two processes of one role each: what arrives is the pair already.
        self._is_in_place = wide == params[0].dtype and self._ranks == [[0], [1]]
        self.table = self._received if self._is_in_place else torch.zeros_like(self._received[:2], dtype=wide)

    def views(self, role: int) -> list[Tensor] | None:
        """As in `GradientPair`: one role is done here."""
        return self._views if role == self._role else None

    def share(self, role: int) -> tuple[int | None, int]:
        """As in `GradientPair`: the processes of a role take equal shares."""
        ranks = self._ranks[role]
        return ranks.index(self._group.rank) if role == self._role else None, max(1, len(ranks))

    def zero_(self) -> None:
        """As in `GradientPair`."""
        self._buffer.zero_()

    def exchange(self, losses: Tensor, n_labels: Sequence[int], wish: Wish) -> None:
        """As in `GradientPair`: every process gets its shard of all gradients, and counts, losses and wishes with it."""
        group, own = self._group, self._group.rank
        header = torch.tensor([n_labels[self._role], 0.0, wish.stop, wish.pause], dtype=torch.float64)
        header = header.to(self.layout.device, non_blocking=True)
        header[_LOSS] = losses[self._role]
        group.swap(
            [message for rank in group.others for message in ((self._buffer[rank], rank), (header, rank))],
            [message for rank in group.others for message in ((self._received[rank], rank), (self._headers[rank], rank))],
        )
        self._received[own], self._headers[own] = self._buffer[own], header
        if self._is_in_place:
            return
        for role, ranks in enumerate(self._ranks):
            self.table[role].zero_()
            for share, rank in zip(self._shares(role).to(self.table.dtype), ranks, strict=True):
                self.table[role].addcmul_(self._received[rank].to(self.table.dtype), share)

    def read(self, *, precise: bool) -> Reading:
        """As in `GradientPair`: each process sums its shard's Grams, and all add them up in the same order."""
        sums = self.layout.gram_sums(self.table, precise=precise, shard=self._group.rank)
        total = self._group.gather_numbers(sums.flatten()).sum(dim=0)
        losses = [(self._shares(role) * self._headers[self._index[role], _LOSS]).sum()[None] for role in (RETAIN, FORGET)]
        wish = [self._headers[:, _STOP].max()[None], self._headers[0, _PAUSE][None]]
        host = torch.cat([total, *losses, *wish]).cpu().numpy()
        return Reading(
            grams=grams_of_sums(host[:-4].reshape(-1, 2, 2)),
            retain_loss=float(host[-4]),
            forget_loss=float(host[-3]),
            wish=Wish(stop=int(host[-2]), pause=bool(host[-1])),
        )

    def combine(self, weights: np.ndarray) -> list[Tensor]:
        """As in `GradientPair`: each process combines its shard and sends it to the others."""
        shard = self.layout.combine_(self.table, weights, shard=self._group.rank)
        self._gather(shard, self._buffer)
        return self._views

    def whole(self, rows: Tensor) -> Tensor:
        """As in `GradientPair`."""
        buffer = torch.zeros_like(self._buffer, dtype=rows.dtype)
        self._gather(rows, buffer)
        return buffer.view(-1)

    def own(self, buffer: Tensor) -> Tensor:
        """As in `GradientPair`."""
        return buffer.view_as(self._buffer)[self._group.rank].clone()

    def _gather(self, shard: Tensor, buffer: Tensor) -> None:
        group = self._group
        buffer[group.rank] = shard
        own = buffer[group.rank]
        group.swap([(own, rank) for rank in group.others], [(buffer[rank], rank) for rank in group.others])

    def _shares(self, role: int) -> Tensor:
        """Share of each process of a role in its labels, shape (processes of the role,)."""
        counts = self._headers[self._index[role], _COUNT]
        return counts / counts.sum().clamp(min=1)


def is_partner_gone(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the group is gone."""
    return any(words in str(error) for words in _PARTNER_GONE)


def roles_of(size: int, *, is_paired: bool, only_role: int = RETAIN) -> list[int]:
    """Role of each rank: even ranks retain and odd ones forget; all the same where a method has one role only."""
    return [rank % 2 if is_paired else only_role for rank in range(size)]


def fingerprint(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """A 64-bit sum over the bit patterns of tensors, each weighted by its place, shape (1,), int64, on `device`."""
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        bits = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.view(_INT_OF_BYTES[flat.element_size()])
        places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd, so that no bit of a pattern is lost
        total = total * 31 + (bits.long() * places).sum()
    return total
