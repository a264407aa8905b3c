"""The passes over blocks of logits that every function is made of.

One pass: statistics, coefficient and gradient of a block while it is there. Two passes, where a
coefficient needs the log-probs of a whole completion: as long as its completions fit in a block,
that is still one making of the logits; only what is longer is made twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .dispatch import Engine
from .head import Head, Logits
from .objective import PolicyLoss
from .onepass import OnePass, folded, one_pass_form
from .values import Coefficients, Evaluated, LossInputs, Prepared, RowStats


class _Span(NamedTuple):
    """Completions first..last - 1, whose tokens are `rows`."""

    first: int
    last: int
    rows: slice


def stats_pass(engine: Engine, tiles: Head | Logits) -> RowStats:
    """Statistics of all rows."""
    parts = _blocks(tiles, _everything(tiles))
    return RowStats.joined([_stats(engine, tiles, part, tiles.tile(part)) for part in parts])


def gradient_pass(
    engine: Engine,
    tiles: Head | Logits,
    stats: RowStats,
    coefficients: Coefficients,
    skip_idle: bool = False,
) -> None:
    """The gradients of all rows, from what a pass before has found out about them."""
    for part in _blocks(tiles, _everything(tiles)):
        tile = tiles.tile(part)
        _gradient(engine, tiles, part, tile, stats.rows(part), coefficients.rows(part), skip_idle)


def loss_pass(
    engine: Engine,
    tiles: Head | Logits,
    loss: PolicyLoss,
    inputs: LossInputs,
    bounds: Tensor,
    *,
    gradient: bool,
    skip_idle: bool = False,
) -> tuple[Evaluated, RowStats]:
    """The loss, and with `gradient` the gradients of what the tiles are made of.

    Args:
        bounds: `cu_seqlens` as the caller gave it, on the host or not.
        skip_idle: leave rows whose coefficient is 0 out of the products of the gradient. How many
            there are must be known on the host, which waits for the device once per block.
    """
    prepared = engine.completions.prepare(loss, inputs, tiles.n_tokens, tiles.dtype)
    form = one_pass_form(loss, inputs.old is not None)
    if not gradient:
        stats = stats_pass(engine, tiles)
    elif form is not None:
        row = folded(form.fold, loss, prepared, inputs)
        stats = _one_pass(engine, tiles, form, row, inputs, skip_idle)
    else:
        lengths = _lengths(bounds, tiles.n_tokens)
        stats = _two_passes(engine, tiles, loss, prepared, inputs, lengths, skip_idle)
    found = engine.completions.evaluate(loss, prepared, inputs, stats.logprobs, stats.entropy)
    return found, stats


def _one_pass(
    engine: Engine,
    tiles: Head | Logits,
    form: OnePass,
    prepared: Prepared,
    inputs: LossInputs,
    skip_idle: bool,
) -> RowStats:
    stats = []
    # Which rows are skipped, and at what scale a gradient fits in fp16, is known only after all
    # coefficients of a block.
    later = skip_idle or tiles.scaled
    for part in _blocks(tiles, _everything(tiles)):
        tile = tiles.tile(part)
        out = None if later else tiles.gradient(part)
        found, coefficients = engine.rows.row_loss(
            tile,
            tiles.scoring.rows(part),
            form.loss,
            prepared.rows(part),
            inputs.rows(part),
            out,
        )
        stats.append(found)
        if out is None:
            _gradient(engine, tiles, part, tile, found, coefficients, skip_idle)
        else:
            tiles.accept(part, out, coefficients)
    return RowStats.joined(stats)


def _two_passes(
    engine: Engine,
    tiles: Head | Logits,
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    lengths: Sequence[int] | None,
    skip_idle: bool,
) -> RowStats:
    stats = []
    for span in _spans(tiles, lengths, inputs.cu_seqlens.shape[0] - 1):
        parts, pieces, tile = list(_blocks(tiles, span.rows)), [], None
        for part in parts:
            tile = tiles.tile(part)
            pieces.append(_stats(engine, tiles, part, tile))
        found = RowStats.joined(pieces)
        stats.append(found)
        bounds = inputs.cu_seqlens[span.first : span.last + 1] - span.rows.start
        whole = inputs.rows(span.rows)._replace(cu_seqlens=bounds)
        coefficients = engine.completions.evaluate(
            loss, prepared.rows(span.rows), whole, found.logprobs, found.entropy
        ).coefficients
        for part in parts:
            if len(parts) > 1 or tile is None:
                tile = tiles.tile(part)
            local = slice(part.start - span.rows.start, part.stop - span.rows.start)
            mine = coefficients.rows(local)
            _gradient(engine, tiles, part, tile, found.rows(local), mine, skip_idle)
    return RowStats.joined(stats)


def _lengths(cu_seqlens: Tensor, n_tokens: int) -> list[int] | None:
    """Tokens of each completion, if the host can tell them without waiting."""
    if cu_seqlens.device.type != "cpu":
        return None
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(bounds)]
    # torch.compile has not let the values be checked.
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] != n_tokens:
        return None
    return lengths


def _spans(tiles: Head | Logits, lengths: Sequence[int] | None, count: int) -> Iterator[_Span]:
    """Runs of completions that fit in a block, and completions that fit in none; everything at
    once if their lengths are not known on the host."""
    if lengths is None or not tiles.n_tokens:
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


def _stats(engine: Engine, tiles: Head | Logits, part: slice, tile: Tensor) -> RowStats:
    return engine.rows.row_stats(tile, tiles.scoring.rows(part))


def _gradient(
    engine: Engine,
    tiles: Head | Logits,
    part: slice,
    tile: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
    skip_idle: bool,
) -> None:
    scoring, out = tiles.scoring.rows(part), tiles.gradient(part)
    if skip_idle and isinstance(tiles, Head):
        index = (~coefficients.idle()).nonzero()[:, 0]
        if not index.shape[0]:
            tiles.accept(part, None, coefficients)
            return
        if index.shape[0] < tile.shape[0]:
            tile, out = tile.index_select(0, index), out[: index.shape[0]]
            scoring, stats = scoring.rows(index), stats.rows(index)
            coefficients = tiles.rescaled(coefficients.rows(index), scoring.temperature)
            engine.rows.row_gradient(tile, scoring, stats, coefficients, out)
            tiles.accept(part, out, coefficients, index)
            return
    coefficients = tiles.rescaled(coefficients, scoring.temperature)
    engine.rows.row_gradient(tile, scoring, stats, coefficients, out)
    tiles.accept(part, out, coefficients)


def _blocks(tiles: Head | Logits, part: slice) -> Iterator[slice]:
    """`part` in slices of at most a block's rows; one slice if it is empty."""
    for start in range(part.start, max(part.stop, part.start + 1), tiles.rows):
        yield slice(start, min(start + tiles.rows, part.stop))


def _everything(tiles: Head | Logits) -> slice:
    return slice(0, tiles.n_tokens)
