"""Isolation: what is not finite stays in its document, and nothing of padding reaches anything.

Kernels hide a pair by a probability of 0, and 0 x NaN is NaN: in a tile with rows of several documents, the NaN of one
would reach all. So bad rows, which are not finite, enter a kernel as zeros, and NaN is put back afterwards where it
belongs: into the rows of their document that may depend on them. Example, causal, * is a bad key:

    document    0 0 0 1 1 1 padding
    key         . . . . * . *          the zeros enter
    out         . . . . N N 0          NaN from the bad key on; padding is 0 as ever

A plan of one document without padding needs none of this. In others it takes, on a CPU, the reading of the rows; bad
ones are rare, so that nothing more is done without them. A device is not asked, as the host would have to wait: there
rows are copied each time, which is linear in their number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.masks.rows import PADDING, Rows

LARGEST_PADDING = 1e14
"""Products of greater numbers, as uninitialized padding may hold, come near the -1e30 by which a kernel masks."""
NEVER = 1 << 31
"""Above every position."""


class Places(NamedTuple):
    """Document, numbered from 1, 0 for padding, and position of each row, int64 `[rows]`."""

    document: Tensor
    position: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Isolation:
    """Of the rows of one plan. count: documents, padding included."""

    queries: Places
    keys: Places
    count: int
    causal: bool
    _elsewhere: dict[torch.device, "Isolation"] = field(default_factory=dict, init=False)

    @staticmethod
    def of(queries: Rows, keys: Rows, *, causal: bool) -> "Isolation | None":
        """Return the isolation of these rows, or None where no row is padding and all have one document."""
        document = torch.cat((queries.document, keys.document)).clamp(min=PADDING)
        if not len(document) or (document[0] >= 0 and bool((document == document[0]).all())):
            return None
        # A padding row in front is number 0, whether there are others or not.
        numbers, document = torch.cat((document.new_full((1,), PADDING), document)).unique(return_inverse=True)
        of_queries, of_keys = document[1:].split((len(queries), len(keys)))
        return Isolation(
            queries=Places(of_queries, queries.position.long()),
            keys=Places(of_keys, keys.position.long()),
            count=len(numbers),
            causal=causal,
        )

    def forward(
        self, attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse of `attend(q, k, v)`; a bad query needs no help, since its row is its own."""
        here = self.to(q.device)
        bad = bad_rows(here.keys.document, k, v)
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
        bad_queries, bad_keys = bad_rows(here.queries.document, dout, q, out), bad_rows(here.keys.document, k, v)
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
        return self._reached(bad_keys, self.keys, self.queries, 1)

    def keys_before(self, bad_queries: Tensor) -> Tensor:
        """Return the keys that a bad query of their document may depend on, bool `[keys]`."""
        return self._reached(bad_queries, self.queries, self.keys, -1)

    def _reached(self, bad: Tensor, of: Places, to: Places, sign: int) -> Tensor:
        # Later rows under a causal mask, earlier ones with the sign changed; all of the document without one.
        sign = sign if self.causal else 0
        first = torch.full((self.count,), NEVER, device=bad.device)
        first.scatter_reduce_(0, of.document, (of.position * sign).masked_fill(~bad, NEVER), "amin")
        # What is in padding reaches nothing.
        first[0] = NEVER
        return first[to.document] <= to.position * sign

    def to(self, device: torch.device) -> "Isolation":
        """Return the same with its columns on `device`, where they are copied once for all layers."""
        if device.type == "cpu":
            return self
        if device not in self._elsewhere:
            queries, keys = (Places(*(x.to(device) for x in places)) for places in (self.queries, self.keys))
            self._elsewhere[device] = Isolation(queries=queries, keys=keys, count=self.count, causal=self.causal)
        return self._elsewhere[device]


def bad_rows(document: Tensor, *tensors: Tensor) -> Tensor:
    """Return which rows of tensors `[rows, heads, width]` are bad: not finite or, in padding, huge; bool `[rows]`.

    document: the number of each row's, int64 `[rows]`, 0 for padding.
    """
    limit = torch.where(document > 0, torch.inf, LARGEST_PADDING)
    good = torch.ones_like(document, dtype=torch.bool)
    for x in tensors:
        # amax and amin return a NaN if there is one, which compares as False.
        good &= (x.amax(dim=(1, 2)) < limit) & (x.amin(dim=(1, 2)) > -limit)
    return ~good


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
