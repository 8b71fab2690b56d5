"""Gradient of the types of keys with lifetimes (NAtS, arXiv 2502.13251), straight through the choice of a type.

Types enter attention as a mask that multiplies exp(score). With t the one-hot type of a token, query i > j has

    M_ij = t0_j + t1_j * prod over j < m < i of (1 - t0_m) + t2_j * [i <= j + window]

The gradient of t is the derivative of this M, at the types that were chosen, under the paper's normalization: it takes
dL/dM_ij to be D_ij = exp(s_ij - L_i) (dout_i . v_j - dout_i . out_i), summed over the query heads that share the key,
with L_i the log-sum-exp of ALL causal scores of query i, the hidden ones too. That of the visible ones only, which
would be exact, lets D grow without bound where a hidden score towers over them. With n(j) the next global token after
j, g(m) the previous one before m, all i and j of one document:

    dt1_j = sum of D_ij over j < i <= n(j)          dt2_j = sum of D_ij over j < i <= j + window
    dt0_m = sum of D_im over i > m  -  sum of D_ij over local j in (g(m), m) and i in (m, n(m)]

A token sees itself whatever its type: its own pair adds the same to all three, which the softmax drops. The subtracted
sum is what a global token takes from earlier local ones, whose lives it ends. Where m is not global, i and j lie in the
same run between two global tokens, and the rectangle is a difference of sums of columns and of rows:

    sum over local j in (g(m), m) of dt1_j  -  sum over i in (g(m), m] of Q_i,  Q_i = sum of D_ij over local j seen by i

Where m is global, i lies in the run after it: the sum over local j in (g(m), m) of that of D_ij over n(j) < i <=
n(n(j)). The published kernel has the subtracted sum at global tokens only, and corrects it for the window of a
convolution; its dt0 leaves out the pairs that a local key would see too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from farspan.kernels.lifetimes.lifetimes import GLOBAL, LOCAL, DocumentOrder, Lifetimes
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind, Region

LATER, UP_TO_NEXT, IN_WINDOW, AFTER_NEXT, SEEN_LOCALS = range(5)
SUMS = 5
"""Numbers per token and KV head, sums of D. Over the queries of a key: all later ones; up to its next global token; in
its window; from that token to the one after it. Over the keys of a query: the earlier local ones that it sees."""
TILE_QUERIES = 256
SCORES_AT_ONCE = 1 << 20
"""Scores of a tile, all heads together, unless there are very many heads."""


@torch.no_grad()
def pair_sums(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal_lse: Tensor, *, plan: Plan, lifetimes: Lifetimes
) -> tuple[Tensor, Tensor]:
    """Return the sums of D over some queries and some keys: the queries' `[T, Hk, SUMS]` and the keys' `[S, Hk, SUMS]`.

    q, dout, out `[T, Hq, .]`, k, v `[S, Hk, .]`. causal_lse `[T, Hq]`: of all causal keys, in the accumulation dtype,
    as the sums are. plan: of all causal pairs of the rows. lifetimes: of the key rows. Memory is linear in the rows;
    sums over disjoint pairs add up.
    """
    device, terms = q.device, _Terms(dout, q, k, v, out, causal_lse)
    of_queries, of_keys = (causal_lse.new_zeros(len(rows), k.shape[1], SUMS) for rows in (q, k))
    local = (lifetimes.types == LOCAL).to(device, causal_lse.dtype)
    sliding = plan.keys.position.long() + lifetimes.window
    # The last query with a sum of its own, beside that over all later ones.
    reach = torch.maximum(lifetimes.beyond.cpu(), sliding).amax(dim=0)
    position, following, beyond = (
        x.to(device) for x in (plan.queries.position[:, None], lifetimes.following, lifetimes.beyond)
    )
    for tile in _tiles(plan, q.shape[1]):
        first = plan.queries.position[tile.queries].min()
        d = terms.of(tile)  # [Hk, queries, keys]
        if tile.kind is Kind.MASKED or plan.keys.position[tile.keys].max() >= first:
            d.masked_fill_(~_later(plan, tile).to(device), 0.0)
        of_keys[tile.keys, :, LATER] += d.sum(dim=1).t()
        # Beyond the reach of all of its keys a tile counts in the sum over later queries only.
        if reach[tile.keys].max() < first:
            continue
        i, n, n_of_n = position[tile.queries], following[:, None, tile.keys], beyond[:, None, tile.keys]
        up_to_next = d.masked_fill(i > n, 0.0)
        of_keys[tile.keys, :, UP_TO_NEXT] += up_to_next.sum(dim=1).t()
        of_keys[tile.keys, :, IN_WINDOW] += d.masked_fill(i > sliding[tile.keys].to(device), 0.0).sum(dim=1).t()
        of_keys[tile.keys, :, AFTER_NEXT] += d.masked_fill((i <= n) | (i > n_of_n), 0.0).sum(dim=1).t()
        of_queries[tile.queries, :, SEEN_LOCALS] += torch.bmm(up_to_next, local[:, tile.keys, None]).squeeze(2).t()
    return of_queries, of_keys


def type_gradient(sums: Tensor, lifetimes: Lifetimes, order: DocumentOrder) -> Tensor:
    """Return the gradient of the one-hot types, float64 `[tokens, Hk, 3]`, by the sums `[tokens, Hk, SUMS]` of all."""
    order = order.to(sums.device)
    # [tokens, Hk, SUMS] -> [SUMS, Hk, tokens]
    ordered = sums.double()[order.index].permute(2, 1, 0)
    types = lifetimes.types[:, order.index]
    local, is_global = types == LOCAL, types == GLOBAL
    columns, columns_after = (_since_global(ordered[which] * local, is_global) for which in (UP_TO_NEXT, AFTER_NEXT))
    rows = _since_global(ordered[SEEN_LOCALS] * ~is_global, is_global)
    of_locals_before = torch.where(is_global, _before(columns_after), _before(columns) - rows)
    of_global = ordered[LATER] - of_locals_before
    gradient = torch.stack((of_global, ordered[UP_TO_NEXT], ordered[IN_WINDOW]))
    return order.restore(gradient).permute(2, 1, 0)


def straight_through(dtypes: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return the gradient of logits `[T, Hk, 3]` whose softmax stands for the one-hot types in the backward pass."""
    # The Jacobian of a softmax: w (dt - sum of w dt), by the logits divided by the temperature.
    weight = (logits / temperature).softmax(dim=-1)
    dtypes = dtypes.to(logits.dtype)
    return weight * (dtypes - (weight * dtypes).sum(dim=-1, keepdim=True)) / temperature


class _Terms:
    """What D is made of, by KV head and in the accumulation dtype."""

    def __init__(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        def by_kv_head(x: Tensor) -> Tensor:
            return x.to(lse.dtype).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [Hk, G, T, .]

        self.q, self.dout = by_kv_head(q) * q.shape[-1] ** -0.5, by_kv_head(dout)
        self.delta = (self.dout * by_kv_head(out)).sum(dim=-1, keepdim=True)
        self.lse = by_kv_head(lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        self.k, self.v = (x.to(lse.dtype).permute(1, 2, 0) for x in (k, v))  # [Hk, ., S]

    def of(self, tile: Region) -> Tensor:
        """Return D of all pairs of a tile, `[Hk, queries, keys]`; nothing is hidden, so some may be infinite."""
        probability, dprobability = (
            torch.matmul(x[:, :, tile.queries].flatten(1, 2), y[:, :, tile.keys]).unflatten(1, (x.shape[1], -1))
            for x, y in ((self.q, self.k), (self.dout, self.v))
        )
        probability.sub_(self.lse[:, :, tile.queries]).exp_()
        return dprobability.sub_(self.delta[:, :, tile.queries]).mul_(probability).sum(dim=1)


def _tiles(plan: Plan, heads: int) -> Iterator[Region]:
    """Yield small regions that hold every pair of the plan, whose heads all see the same."""
    (part,) = plan.parts
    num_keys = max(SCORES_AT_ONCE // (heads * TILE_QUERIES), 64)
    for region in part.regions:
        for start in range(region.query_start, region.query_stop, TILE_QUERIES):
            stop = min(start + TILE_QUERIES, region.query_stop)
            key_stop = region.key_stop
            if region.kind is Kind.CAUSAL:
                key_stop = min(key_stop, region.key_start + stop - region.query_start)
            for key in range(region.key_start, key_stop, num_keys):
                yield Region(region.kind, start, stop, key, min(key + num_keys, key_stop))


def _later(plan: Plan, tile: Region) -> Tensor:
    """Return which queries of a tile are later than which keys of their document, bool `[queries, keys]`."""
    position, key_position = plan.queries.position[tile.queries], plan.keys.position[tile.keys]
    return plan.region_mask(plan.attention_mask, tile) & (position[:, None] > key_position)


def _since_global(x: Tensor, is_global: Tensor) -> Tensor:
    """Return the running sums of x `[Hk, tokens]` that start anew at each global token.

    Differences of sums over everything would carry the rounding of other documents and of later tokens.
    """
    if not x.shape[1]:
        return x
    place = torch.arange(x.shape[1], device=x.device)
    since = place - torch.where(is_global, place, 0).cummax(dim=1).values
    # Doubling: after step s each place holds the sum of up to 2^s places of its run.
    shift = 1
    while shift <= int(since.max()):
        x = x + torch.where(since >= shift, x.roll(shift, dims=1), 0.0)
        shift *= 2
    return x


def _before(x: Tensor) -> Tensor:
    """Return what stands one place before each, `[Hk, tokens]`; 0 before the first."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
