"""Isolation: what is not finite stays in its document, and nothing of padding reaches anything.

Kernels hide a pair by a probability of 0, and 0 x NaN is NaN: in a tile with rows of several documents, the NaN of one
would reach all. So bad rows, which are not finite, enter a kernel as zeros, and NaN is put back afterwards where it
belongs: into the rows of their document that may depend on them. Example, causal, * is a bad key:

    document    0 0 0 1 1 1 padding
    key         . . . . * . *          the zeros enter
    out         . . . . N N 0          NaN from the bad key on; padding is 0 as ever

A plan of one document without padding needs none of this. In others it takes, on a CPU, the reading of the rows; bad
ones are rare, so that nothing more is done without them. A device is not asked, as the host would have to wait: there
rows are copied each time, which is linear in their number, in 16 operations forward and 41 backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.rows import PADDING, Rows

LARGEST_PADDING = 1e14
"""Products of greater numbers, as uninitialized padding may hold, come near the -1e30 by which a kernel masks."""
NEVER = 1 << 31
"""Above every position; below them, that of a state included, is -NEVER."""


class Places(NamedTuple):
    """Document, numbered from 1, 0 for padding, and position of each row, int64 `[rows]`.

    limit: what the numbers of a good row are below, float32 `[rows]`: infinity, or LARGEST_PADDING.
    """

    document: Tensor
    position: Tensor
    limit: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Isolation:
    """Of the rows of one plan. Without a causal mask all positions are 0. count: documents, padding included."""

    queries: Places
    keys: Places
    count: int
    _elsewhere: dict[torch.device, "Isolation"] = field(default_factory=dict, init=False)

    @staticmethod
    def of(queries: Rows, keys: Rows, *, causal: bool) -> "Isolation | None":
        """Return the isolation of these rows, or None where no row is padding and all have one document."""
        document = torch.cat((queries.document, keys.document)).clamp(min=PADDING)
        if not len(document) or (document[0] >= 0 and bool((document == document[0]).all())):
            return None
        # A padding row in front is number 0, whether there are others or not.
        numbers, document = torch.cat((document.new_full((1,), PADDING), document)).unique(return_inverse=True)
        documents = document[1:].split((len(queries), len(keys)))
        places = (
            Places(
                document,
                rows.position.long() if causal else torch.zeros_like(document),
                torch.where(document > 0, torch.inf, LARGEST_PADDING),
            )
            for document, rows in zip(documents, (queries, keys), strict=True)
        )
        return Isolation(queries=next(places), keys=next(places), count=len(numbers))

    def forward(
        self, attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse of `attend(q, k, v)`; a bad query needs no help, since its row is its own."""
        here = self.to(q.device)
        bad = bad_rows(here.keys.limit, k, v)
        if surely_none(bad):
            return attend(q, k, v)
        out, lse = attend(q, *zeroed(bad, k, v))
        poison_(here.queries_after(bad), out, lse)
        return out, lse

    def backward(
        self,
        attend: Callable[..., tuple[Tensor, Tensor, Tensor]],
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of `attend(dout, q, k, v, out, lse)`."""
        here = self.to(q.device)
        bad_queries, bad_keys = bad_rows(here.queries.limit, dout, q, out), bad_rows(here.keys.limit, k, v)
        if surely_none(bad_queries) and surely_none(bad_keys):
            return attend(dout, q, k, v, out, lse)
        dout, q, out, lse = zeroed(bad_queries, dout, q, out, lse)
        dq, dk, dv = attend(dout, q, *zeroed(bad_keys, k, v), out, lse)
        # A bad row has bad gradients of its own, too.
        poison_(here.queries_after(bad_keys) | (bad_queries & (here.queries.document > 0)), dq)
        poison_(here.keys_before(bad_queries) | (bad_keys & (here.keys.document > 0)), dk, dv)
        return dq, dk, dv

    def queries_after(self, bad_keys: Tensor) -> Tensor:
        """Return the queries that may depend on a bad key of their document, bool `[queries]`."""
        # Later rows under a causal mask; without one, all of the document, as positions are equal.
        return self._extreme(bad_keys, self.keys, NEVER)[self.queries.document] <= self.queries.position

    def keys_before(self, bad_queries: Tensor) -> Tensor:
        """Return the keys that a bad query of their document may depend on, bool `[keys]`."""
        return self._extreme(bad_queries, self.queries, -NEVER)[self.keys.document] >= self.keys.position

    def _extreme(self, bad: Tensor, of: Places, never: int) -> Tensor:
        """Return where each document's first bad row is, or its last one if `never` is negative; `never` if none is."""
        position = torch.where(bad, of.position, never)
        extreme = torch.full((self.count,), never, device=bad.device)
        extreme.scatter_reduce_(0, of.document, position, "amin" if never > 0 else "amax")
        # What is in padding reaches nothing.
        extreme[:1].fill_(never)
        return extreme

    def of_queries(self, index: Tensor) -> "Isolation":
        """Return the same of the queries at `index`, int64 `[queries]`, on its device."""
        here = self.to(index.device)
        return Isolation(queries=Places(*(x[index] for x in here.queries)), keys=here.keys, count=here.count)

    def to(self, device: torch.device) -> "Isolation":
        """Return the same with its columns on `device`, where they are copied once for all layers."""
        if device == self.keys.document.device:
            return self

        def copied(places: Places) -> Places:
            return Places(*(copy_to(x, device) for x in places))

        return once(
            self._elsewhere,
            device,
            lambda: Isolation(queries=copied(self.queries), keys=copied(self.keys), count=self.count),
        )


def bad_rows(limit: Tensor, *tensors: Tensor) -> Tensor:
    """Return which rows of tensors `[rows, heads, width]` are bad: not finite or, in padding, huge; bool `[rows]`.

    limit: see `Places`.
    """
    # max passes a NaN on, which compares as False.
    largest = reduce(torch.maximum, map(_largest, tensors))
    return ~(largest < limit)


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitude in each row of x `[rows, heads, width]`, NaN if there is one, `[rows]`."""
    if x.device.type == "cpu":
        # 5 times as fast there as the norm, which is a single operation of a device.
        return torch.maximum(x.amax(dim=(1, 2)), -x.amin(dim=(1, 2)))
    return torch.linalg.vector_norm(x, torch.inf, dim=(1, 2))


def surely_none(bad: Tensor) -> bool:
    """Return whether no row is bad, as far as that is known without waiting for a device."""
    return bad.device.type == "cpu" and not bool(bad.any())


def zeroed(bad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return copies of tensors `[rows, ...]` with bad rows, bool `[rows]`, of 0."""
    return tuple(x.masked_fill(bad.view(-1, *[1] * (x.dim() - 1)), 0.0) for x in tensors)


def poison_(rows: Tensor, *tensors: Tensor) -> None:
    """Put NaN into these rows, bool `[rows]`, of tensors `[rows, ...]`, in place."""
    for x in tensors:
        x.masked_fill_(rows.view(-1, *[1] * (x.dim() - 1)), torch.nan)
