"""The passes over blocks of logits that every function is made of.

One pass: statistics, coefficient and gradient of a block while it is there. Two passes, where a
coefficient needs the log-probs of a whole completion: as long as its completions fit in a block,
that is still one making of the logits; only what is longer is made twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .grouping import GroupAdvantages, Rewards
from .inputs import Coefficients, Evaluated, LossInputs, Prepared
from .objective import PolicyLoss
from .onepass import Fold, OnePass, one_pass_form
from .scores import RowStats, Scoring
from .tiles import Tiles, chunks


class Engine(Protocol):
    """What a backend implements; see `torch_backend/rows.py` and `torch_backend/losses.py`."""

    def row_stats(self, tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> RowStats: ...

    def row_gradient(
        self,
        tile: Tensor,
        scoring: Scoring,
        stats: RowStats,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None: ...

    def row_loss(
        self,
        tile: Tensor,
        scoring: Scoring,
        loss: PolicyLoss,
        prepared: Prepared,
        inputs: LossInputs,
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> tuple[RowStats, Coefficients]: ...

    def prepare(
        self, loss: PolicyLoss, inputs: LossInputs, fold: Fold, n_tokens: int, dtype: torch.dtype
    ) -> Prepared: ...

    def evaluate(
        self, loss: PolicyLoss, inputs: LossInputs, logprobs: Tensor, entropy: Tensor | None
    ) -> Evaluated: ...

    def group_advantages(self, grouped: Rewards) -> GroupAdvantages: ...


class Scored(NamedTuple):
    """The loss of some tiles, and the statistics of their rows."""

    evaluated: Evaluated
    stats: RowStats


class _Span(NamedTuple):
    """Completions first..last - 1, whose tokens are `rows`."""

    first: int
    last: int
    rows: slice


def stats_pass(engine: Engine, tiles: Tiles) -> RowStats:
    """Statistics of all rows."""
    stats = _empty_stats(tiles)
    for part in chunks(_everything(tiles), tiles.rows):
        _stats(engine, tiles, part, tiles.tile(part)).store(stats, part)
    return stats


def gradient_pass(
    engine: Engine, tiles: Tiles, stats: RowStats, coefficients: Coefficients
) -> None:
    """The gradients of all rows, from what a pass before has found out about them."""
    for piece in chunks(_everything(tiles), tiles.rows):
        _gradient(
            engine,
            tiles,
            piece,
            tiles.tile(piece),
            stats.rows(piece),
            coefficients.rows(piece),
        )


def loss_pass(
    engine: Engine,
    tiles: Tiles,
    loss: PolicyLoss,
    inputs: LossInputs,
    lengths: Sequence[int] | None,
    *,
    gradient: bool,
    skip_idle: bool = False,
) -> Scored:
    """The loss, and with `gradient` the gradients of what the tiles are made of.

    Args:
        lengths: tokens of each completion, if they are known on the host.
        skip_idle: leave rows whose coefficient is 0 out of the products of the gradient. How many
            there are must be known on the host, which waits for the device once per block.
    """
    form = one_pass_form(loss, inputs.old is not None)
    if not gradient:
        stats = stats_pass(engine, tiles)
    elif form is not None:
        stats = _one_pass(engine, tiles, loss, inputs, form, skip_idle)
    else:
        stats = _two_passes(engine, tiles, loss, inputs, lengths, skip_idle)
    return Scored(engine.evaluate(loss, inputs, stats.logprobs, stats.entropy), stats)


def _one_pass(
    engine: Engine,
    tiles: Tiles,
    loss: PolicyLoss,
    inputs: LossInputs,
    form: OnePass,
    skip_idle: bool,
) -> RowStats:
    stats = _empty_stats(tiles)
    prepared = engine.prepare(loss, inputs, form.fold, tiles.n_tokens, tiles.dtype)
    for part in chunks(_everything(tiles), tiles.rows):
        tile = tiles.tile(part)
        out = None if skip_idle else tiles.gradient(part, tile)
        found, coefficients = engine.row_loss(
            tile,
            tiles.scoring.rows(part),
            form.loss,
            Prepared(*(tensor[part] for tensor in prepared)),
            inputs.rows(part),
            tiles.dtype,
            out,
        )
        found.store(stats, part)
        if out is None:
            _gradient_of_active(engine, tiles, part, tile, found, coefficients)
        else:
            tiles.accept(part, out, coefficients)
    return stats


def _two_passes(
    engine: Engine,
    tiles: Tiles,
    loss: PolicyLoss,
    inputs: LossInputs,
    lengths: Sequence[int] | None,
    skip_idle: bool,
) -> RowStats:
    stats = _empty_stats(tiles)
    if inputs.rewards is not None:
        advantages = engine.group_advantages(inputs.rewards).advantages
        inputs = inputs._replace(advantages=advantages, rewards=None)
    write = _gradient_of_active if skip_idle else _gradient
    for span in _spans(tiles, lengths, inputs.cu_seqlens.shape[0] - 1):
        pieces = list(chunks(span.rows, tiles.rows))
        tile = None
        for part in pieces:
            tile = tiles.tile(part)
            _stats(engine, tiles, part, tile).store(stats, part)
        whole = inputs
        if span.rows != _everything(tiles):
            whole = inputs.completions(span.first, span.last, span.rows)
        found = stats.rows(span.rows)
        coefficients = engine.evaluate(loss, whole, found.logprobs, found.entropy).coefficients
        for part in pieces:
            if len(pieces) > 1 or tile is None:
                tile = tiles.tile(part)
            local = slice(part.start - span.rows.start, part.stop - span.rows.start)
            write(engine, tiles, part, tile, found.rows(local), coefficients.rows(local))
    return stats


def _spans(tiles: Tiles, lengths: Sequence[int] | None, count: int) -> Iterator[_Span]:
    """Runs of completions that fit in a block, and completions that fit in none; everything at
    once if their lengths are not known on the host."""
    if lengths is None:
        yield _Span(0, count, _everything(tiles))
        return
    first = start = stop = 0
    for i, length in enumerate(lengths):
        if stop > start and stop + length - start > tiles.rows:
            yield _Span(first, i, slice(start, stop))
            first, start = i, stop
        stop += length
    if stop > start:
        yield _Span(first, count, slice(start, stop))


def _stats(engine: Engine, tiles: Tiles, part: slice, tile: Tensor) -> RowStats:
    return engine.row_stats(tile, tiles.scoring.rows(part), tiles.dtype)


def _gradient(
    engine: Engine,
    tiles: Tiles,
    part: slice,
    tile: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
) -> None:
    out = tiles.gradient(part, tile)
    engine.row_gradient(tile, tiles.scoring.rows(part), stats, coefficients, out)
    tiles.accept(part, out, coefficients)


def _gradient_of_active(
    engine: Engine,
    tiles: Tiles,
    part: slice,
    tile: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
) -> None:
    index = (~coefficients.idle()).nonzero()[:, 0]
    if index.shape[0] == tile.shape[0]:
        _gradient(engine, tiles, part, tile, stats, coefficients)
    elif index.shape[0]:
        tile = tile.index_select(0, index)
        out = tiles.gradient(part, tile)
        coefficients = coefficients.rows(index)
        scoring = tiles.scoring.rows(part).rows(index)
        engine.row_gradient(tile, scoring, stats.rows(index), coefficients, out)
        tiles.accept_rows(part, index, out, coefficients)


def _everything(tiles: Tiles) -> slice:
    return slice(0, tiles.n_tokens)


def _empty_stats(tiles: Tiles) -> RowStats:
    device = tiles.scoring.targets.device
    return RowStats(
        *(torch.empty(tiles.n_tokens, dtype=tiles.dtype, device=device) for _ in range(4))
    )
