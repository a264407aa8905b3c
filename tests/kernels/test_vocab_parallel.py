"""Log-probs and loss over a vocabulary that is split over ranks, against those of one process.

Three threads, each a rank of PyTorch's threaded process group, run the cases one after the other, in
groups of two or three of them; each test reads what became of one case. Real processes run those
that need them.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg

from perl_kernels import (
    GroupedRewards,
    LossOutput,
    PolicyLoss,
    TokenLogprobs,
    linear_grpo_loss,
    linear_token_logprobs,
    reference,
    rows_torch,
)
from tests.forked import Forked
from tests.kernels.naive import Problem
from tests.messages import refused

WORLD = 3
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
SINGLE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
SPLITS = {2: ((6, 7), (0, 13)), 3: ((4, 1, 8), (5, 0, 8), (0, 13, 0))}
ROW_TEMPERATURE = torch.linspace(0.5, 2.0, 16, dtype=torch.float64)
LOSSES = {
    "dapo": PolicyLoss.preset("dapo", kl="k3", kl_coef=0.1, entropy_coef=0.05),
    "gspo": PolicyLoss.preset("gspo"),
    "corrected": PolicyLoss(correction="sequence_truncate", entropy_coef=-0.1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"bias": True, "softcap": 1.5, "temperature": 1.3},
    "row-temperature": {"temperature": ROW_TEMPERATURE},
}

# Threads share what is patched, and the interpreter of Triton.
OF_PROCESSES = (
    "plain-3",
    "triton",
    "bad_targets",
    "unseen_other_targets",
    "number_of_collectives",
    "idle_rows",
)

Case = Callable[[dist.ProcessGroup], None]
CASES: dict[str, tuple[int, Case]] = {}


def case(world: int) -> Callable[[Case], Case]:
    """To be run by the first `world` processes."""

    def register(run: Case) -> Case:
        CASES[run.__name__] = world, run
        return run

    return register


class Split:
    """A problem whole, and this rank's part of its head, ready to be differentiated."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        sizes: tuple[int, ...],
        problem: Problem,
        dtype: torch.dtype = torch.float64,
        bias: bool = False,
        **options: Any,
    ) -> None:
        self.group, self.problem, self.options = group, problem, options
        start = sum(sizes[: dist.get_rank(group)])
        self.part = slice(start, start + sizes[dist.get_rank(group)])
        names = ("hidden", "weight", "bias") if bias else ("hidden", "weight")
        self.whole = {name: getattr(problem, name).to(dtype).requires_grad_() for name in names}
        self.mine = {
            name: (tensor if name == "hidden" else tensor[self.part])
            .detach()
            .clone()
            .requires_grad_()
            for name, tensor in self.whole.items()
        }

    def run(self, **more: Any) -> TokenLogprobs:
        given = {"targets": self.problem.targets, **self.mine, **self.options, **more}
        return linear_token_logprobs(group=self.group, **given)

    def alone(self, **more: Any) -> TokenLogprobs:
        """By one process with the whole head."""
        given = {"targets": self.problem.targets, **self.whole, **self.options, **more}
        return linear_token_logprobs(**given)

    def loss(self, loss: PolicyLoss, **more: Any) -> LossOutput:
        given = {"targets": self.problem.targets, **self.problem.loss_arguments(), **self.options}
        return linear_grpo_loss(loss=loss, group=self.group, **self.mine, **{**given, **more})

    def loss_alone(self, loss: PolicyLoss, **more: Any) -> LossOutput:
        given = {"targets": self.problem.targets, **self.problem.loss_arguments(), **self.options}
        return linear_grpo_loss(loss=loss, **self.whole, **{**given, **more})

    def check_loss(self, loss: PolicyLoss, tolerance: dict[str, Any], **more: Any) -> None:
        more = {"chunk_size": 5, **more}
        got, wanted = self.loss(loss, **more), self.loss_alone(loss, **more)
        torch.testing.assert_close(got._asdict(), wanted._asdict(), **tolerance)
        gradients = self.gradients(got[:1], self.mine)
        torch.testing.assert_close(gradients, self.gradients(wanted[:1], self.whole), **tolerance)
        for tensor in (*got[:3], *got.metrics.values(), gradients[0]):
            tensors = gathered(tensor.detach(), self.group)
            assert all(torch.equal(tensors[0], other) for other in tensors)

    def gradients(self, outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> list[Tensor]:
        """Of hidden and of this rank's part of weight and bias."""
        generator = torch.Generator().manual_seed(3)
        upstream = [
            torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            for output in outputs
        ]
        found = torch.autograd.grad(tuple(outputs), list(leaves.values()), upstream)
        return [
            g[self.part] if leaves is self.whole and name != "hidden" else g
            for name, g in zip(leaves, found, strict=True)
        ]

    def check(self, tolerance: dict[str, Any], **more: Any) -> None:
        outputs = self.run(**more)
        gradients = self.gradients(outputs, self.mine)
        same = [*outputs, gradients[0]]
        everybody_s = [gathered(tensor.detach(), self.group) for tensor in same]
        wanted = self.alone(chunk_size=5)
        torch.testing.assert_close(tuple(outputs), tuple(wanted), **tolerance)
        torch.testing.assert_close(gradients, self.gradients(wanted, self.whole), **tolerance)
        for tensors in everybody_s:
            assert all(torch.equal(tensors[0], tensor) for tensor in tensors)


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return parts


def equal_to_one_process(group: dist.ProcessGroup, options: dict[str, Any]) -> None:
    for sizes in SPLITS[dist.get_world_size(group)]:
        for chunk_size in (3, None):
            split = Split(group, sizes, Problem.make(), **options)
            split.check(EXACT, chunk_size=chunk_size)


CASES.update(
    (f"{name}-{world}", (world, functools.partial(equal_to_one_process, options=options)))
    for world in SPLITS
    for name, options in OPTIONS.items()
)


@case(3)
def losses(group: dist.ProcessGroup) -> None:
    problem = Problem.make()
    generator = torch.Generator().manual_seed(2)
    rewards = GroupedRewards(torch.randn(5, generator=generator), torch.tensor([3, 2]))
    more: tuple[dict[str, Any], ...] = (
        {},
        {"old_logprobs": None, "chunk_size": None, "normalizer": 7.0},
        {"advantages": rewards, "skip_idle": True, "weights": None},
    )
    for sizes, options in zip(SPLITS[3], list(OPTIONS.values())[1:], strict=True):
        for loss, changes in itertools.product(LOSSES.values(), more):
            Split(group, sizes, problem, **options).check_loss(loss, EXACT, **changes)


@case(2)
def loss_of_nothing_to_score(group: dist.ProcessGroup) -> None:
    for lengths in ((0, 0), ()):
        problem = Problem.make(lengths)
        Split(group, (0, 13), problem, bias=True).check_loss(LOSSES["dapo"], EXACT)


@case(2)
def loss_beside_rows_that_do_not_count(group: dist.ProcessGroup) -> None:
    """Of weight 0, whatever their hidden states are."""
    for skip_idle in (False, True):
        problem = Problem.make()
        problem.hidden[problem.weights == 0] = torch.nan
        split = Split(group, (4, 9), problem, bias=True)
        got, wanted = (
            run(LOSSES["dapo"], skip_idle=skip_idle) for run in (split.loss, split.loss_alone)
        )
        assert got.loss.isfinite()
        torch.testing.assert_close(got.loss, wanted.loss, **EXACT)
        torch.testing.assert_close(
            split.gradients(got[:1], split.mine), split.gradients(wanted[:1], split.whole), **EXACT
        )


@case(3)
def loss_in_half_precision(group: dist.ProcessGroup) -> None:
    """At most three times PyTorch's own error in the dtype."""
    problem = Problem.make((40, 1, 60), vocab=300)
    for dtype, (name, loss) in itertools.product((torch.bfloat16, torch.float16), LOSSES.items()):
        rounded = {
            name: getattr(problem, name).to(dtype).double() for name in ("hidden", "weight", "bias")
        }
        exact = Problem(**{**vars(problem), **rounded})
        truth = Split(group, (100, 20, 180), exact, bias=True)
        split = Split(group, (100, 20, 180), exact, dtype, bias=True)
        wanted = truth.loss_alone(loss)
        theirs = reference.linear_grpo_loss(
            targets=exact.targets, loss=loss, **exact.loss_arguments(), **split.whole
        )
        got = split.loss(loss, chunk_size=30)
        for ours, other, true in zip(
            split.gradients(got[:1], split.mine),
            split.gradients(theirs[:1], split.whole),
            truth.gradients(wanted[:1], truth.whole),
            strict=True,
        ):
            allowed = 3 * (other - true).abs().max() + 1e-6
            assert (ours - true).abs().max() <= allowed, (dtype, name)
        assert (got.loss - wanted.loss).abs() <= 2 * (theirs.loss - wanted.loss).abs() + 1e-6


@case(2)
def one_process_has_the_whole_head(group: dist.ProcessGroup) -> None:
    """As without a group, to the last bit, and without collectives that others would have to join."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    split = Split(alone, (13,), Problem.make(), bias=True)
    if dist.get_rank(group) == 0:
        zero = {"rtol": 0.0, "atol": 0.0}
        split.check_loss(LOSSES["dapo"], zero, skip_idle=True)
        split.check(zero, chunk_size=5)


@case(3)
def triton(group: dist.ProcessGroup) -> None:
    problem = Problem.make((3, 2))
    options = {"bias": True, "softcap": 1.5, "temperature": ROW_TEMPERATURE[:5].float()}
    for masked in ([], [0, 1, 2, 3]):
        problem.bias[masked] = -torch.inf
        problem.targets[:] = problem.targets % 9 + 4
        split = Split(group, (4, 9, 0), problem, torch.float32, **options)
        split.check(SINGLE, backend="triton", chunk_size=2)
        split.check_loss(LOSSES["dapo"], SINGLE, backend="triton", chunk_size=2)


@case(2)
def int32_targets_and_one_result_used(group: dist.ProcessGroup) -> None:
    problem = Problem.make()
    split = Split(group, (6, 7), problem)
    for field in TokenLogprobs._fields:
        got = getattr(split.run(targets=problem.targets.int()), field)
        wanted = getattr(split.alone(), field)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), split.mine["hidden"]),
            torch.autograd.grad(wanted.square().sum(), split.whole["hidden"]),
            **EXACT,
        )


@case(3)
def half_precision(group: dist.ProcessGroup) -> None:
    """At most twice (gradients: three times) PyTorch's own error in the dtype, with and without
    fp32 logits."""
    problem = Problem.make((40, 1, 60), vocab=300)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = {
            name: getattr(problem, name).to(dtype).double() for name in ("hidden", "weight", "bias")
        }
        exact = Problem(**{**vars(problem), **rounded})
        truth = Split(group, (100, 20, 180), exact, bias=True)
        wanted = truth.alone()
        wanted = [*wanted, *truth.gradients(wanted, truth.whole)]
        split = Split(group, (100, 20, 180), exact, dtype, bias=True)
        theirs = reference.linear_token_logprobs(targets=exact.targets, **split.whole)
        theirs = [*theirs, *split.gradients(theirs, split.whole)]
        for logits_dtype in (None, torch.float32):
            ours = split.run(chunk_size=7, logits_dtype=logits_dtype)
            ours = [*ours, *split.gradients(ours, split.mine)]
            assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 3
            for i, (got, other, true) in enumerate(zip(ours, theirs, wanted, strict=True)):
                allowed = (2 if i < 2 else 3) * (other - true).abs().max() + 1e-6
                assert (got - true).abs().max() <= allowed, (dtype, i)


@case(2)
def autocast(group: dist.ProcessGroup) -> None:
    problem = Problem.make((40, 1, 60), vocab=100)
    split = Split(group, (30, 70), problem, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = split.run()
        # The backward's products are no business of autocast either.
        gradients = split.gradients(got, split.mine)
        wanted = split.alone()
    assert gradients[0].dtype == gradients[1].dtype == torch.float32
    torch.testing.assert_close(tuple(got), tuple(wanted), **SINGLE)
    # Each rank's part of the gradient of hidden is a bf16 product.
    half: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(gradients, split.gradients(wanted, split.whole), **half)


@case(3)
def large_scores(group: dist.ProcessGroup) -> None:
    """Scores that fp32 holds exactly, but not their log-sum-exp: its last place is 2e-3 there."""
    problem = Problem.make()
    bias = 3e4 + (problem.bias * 256).round() / 256
    problem = Problem(**{**vars(problem), "hidden": 0 * problem.hidden, "bias": bias})
    wanted = Split(group, (4, 1, 8), problem, bias=True).alone()
    for got, true in zip(
        Split(group, (4, 1, 8), problem, torch.float32, bias=True).run(), wanted, strict=True
    ):
        assert (got - true).abs().max() < 5e-6


@case(3)
def far_apart(group: dist.ProcessGroup) -> None:
    """A part of the vocabulary whose share of the probability is 0 in the dtype, or all of it."""
    problem = Problem.make()
    for shift in (-2000.0, 2000.0):
        bias = problem.bias.clone()
        bias[:4] += shift
        moved = Problem(**{**vars(problem), "bias": bias})
        Split(group, (4, 1, 8), moved, bias=True).check(EXACT)


@case(3)
def broken_scores(group: dist.ProcessGroup) -> None:
    """NaN or +inf in one rank's part makes the whole row NaN, on every rank; so does a row of
    nothing but -inf."""
    for value in (float("inf"), float("nan"), -float("inf")):
        for argument, index in (("hidden", 4), ("bias", 1), ("bias", 12), ("bias", slice(None))):
            if (argument, value) == ("bias", -float("inf")) and isinstance(index, int):
                continue
            problem = Problem.make()
            getattr(problem, argument)[index] = value
            split = Split(group, (5, 0, 8), problem, bias=True)
            got = split.run()
            bad = got.logprobs.isnan()
            assert torch.equal(bad, got.entropy.isnan())
            assert torch.equal(bad, split.alone().logprobs.isnan())
            rows = torch.tensor([argument == "bias" or i == index for i in range(16)])
            assert torch.equal(bad, rows)
            (gradient,) = torch.autograd.grad(got.entropy.sum(), split.mine["hidden"])
            assert torch.equal(gradient.isnan().any(1), bad)


@case(3)
def columns_of_probability_zero(group: dist.ProcessGroup) -> None:
    """Some of a rank's part, or all of it: a score of -inf is a probability of 0."""
    for masked in ([0, 7], [4], [0, 1, 2, 3], [*range(5, 13)], [*range(12)]):
        problem = Problem.make()
        problem.bias[masked] = -torch.inf
        kept = problem.bias.isfinite().nonzero()[:, 0]
        problem.targets[:] = kept[problem.targets % len(kept)]
        split = Split(group, (4, 1, 8), problem, bias=True, temperature=0.7)
        split.check(EXACT, chunk_size=5)
        gradients = split.gradients(split.run(), split.mine)
        mine = problem.bias[split.part] == -torch.inf
        assert (gradients[1][mine] == 0).all() and (gradients[2][mine] == 0).all()


@case(3)
def bad_targets(group: dist.ProcessGroup) -> None:
    problem = Problem.make()
    split = Split(group, (5, 0, 8), problem)
    for token in (-1, 13):
        problem.targets[2] = token
        with refused("targets", token, "V = 13", error=ValueError):
            split.run()
        # Where values are not looked at, that row is NaN, and the others are what they were.
        with mock.patch("perl_kernels.vocab_parallel.values_visible", return_value=False):
            got = split.run()
        fine = torch.arange(16) != 2
        targets = torch.where(fine, problem.targets, 0)
        assert got.logprobs[2].isnan()
        wanted = split.alone(targets=targets)
        torch.testing.assert_close(got.logprobs[fine], wanted.logprobs[fine], **EXACT)
        torch.testing.assert_close(got.entropy, wanted.entropy, **EXACT)
        gradients = split.gradients(TokenLogprobs(*(x[fine] for x in got)), split.mine)
        wanted = split.gradients(TokenLogprobs(*(x[fine] for x in wanted)), split.whole)
        torch.testing.assert_close(gradients, wanted, **EXACT)


@case(2)
def unseen_other_targets(group: dist.ProcessGroup) -> None:
    problem = Problem.make()
    problem.targets[9] = dist.get_rank()
    with mock.patch("perl_kernels.vocab_parallel.values_visible", return_value=False):
        found = Split(group, (6, 7), problem).loss(LOSSES["dapo"])
    assert found.loss.isnan() and found.metrics["invalid_rows"] > 0


@case(2)
def bad_arguments(group: dist.ProcessGroup) -> None:
    split = Split(group, (6, 7), Problem.make())
    for changes, error, names in (
        ({"group": "world"}, TypeError, ("str", "ProcessGroup", None)),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, TypeError, ("ProcessGroup", None)),
        ({"hidden": [1.0]}, TypeError, ("list", "[N, H]")),
        ({"weight": torch.randn(4, 3)}, ValueError, ([4, 3], "[V, H]", "hidden")),
        ({"weight": torch.randn(4, 6)}, TypeError, ("torch.float32", "torch.float64")),
        ({"bias": torch.randn(3)}, ValueError, ([3], "[V]")),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, ([3], "[N]", "N = 16")),
        ({"targets": torch.zeros(16)}, TypeError, ("torch.float32", "int64")),
        ({"temperature": 0.0}, ValueError, (0.0,)),
        ({"temperature": torch.ones(3)}, ValueError, ([3], "[N]", "N = 16")),
        ({"temperature": torch.ones(16, device="meta")}, ValueError, ("meta", "cpu")),
        ({"softcap": -1.0}, ValueError, (-1.0,)),
        ({"chunk_size": 0}, ValueError, (0, 1)),
    ):
        given = {"targets": split.problem.targets, "group": split.group, **split.mine, **changes}
        with refused(next(iter(changes)), *names, error=error):
            linear_token_logprobs(**given)


@case(2)
def other_tokens_on_another_rank(group: dist.ProcessGroup) -> None:
    problem = Problem.make((3, 2) if dist.get_rank() else (3, 3))
    with refused("hidden", "N", [6, 5], error=ValueError):
        Split(group, (6, 7), problem).run()
    problem = Problem.make()
    split = Split(group, (6, 7), problem)
    if dist.get_rank():
        problem.targets[:] = problem.targets.flip(0)
    with refused("targets", "same", "whole vocabulary", error=ValueError):
        split.loss(LOSSES["dapo"])


@case(3)
def nothing_to_score(group: dist.ProcessGroup) -> None:
    problem = Problem.make((0,))
    Split(group, (5, 0, 8), problem, bias=True).check(EXACT)


@case(3)
def number_of_collectives(group: dist.ProcessGroup) -> None:
    """The same on every rank, whatever is empty; none for the gradient of a frozen hidden."""
    for lengths in ((3, 2), (0,)):
        split = Split(group, (5, 0, 8), Problem.make(lengths))
        with (
            mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers,
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduces,
        ):
            split.run().entropy.sum().backward()
            assert (gathers.call_count, reduces.call_count) == (2, 1)
            split.mine["hidden"].requires_grad_(False)
            split.run().logprobs.sum().backward()
            assert (gathers.call_count, reduces.call_count) == (4, 1)
            with torch.no_grad():
                assert not split.run().logprobs.requires_grad
            split.mine["hidden"].requires_grad_()
            split.loss(LOSSES["dapo"]).loss.backward()
            assert (gathers.call_count, reduces.call_count) == (8, 2)
            narrow = Split(group, (5, 0, 8), Problem.make(lengths), torch.bfloat16)
            narrow.loss(LOSSES["dapo"]).loss.backward()
            assert reduces.call_args.args[0].dtype == torch.float32


@case(2)
def idle_rows(group: dist.ProcessGroup) -> None:
    """Left out of the products; at a ratio of 1 nothing is clipped, so they are those of weight 0."""
    split = Split(group, (6, 7), Problem.make())
    with mock.patch.object(rows_torch, "row_gradient", wraps=rows_torch.row_gradient) as gradient:
        for skip_idle, rows in ((False, 16), (True, 12)):
            split.loss(LOSSES["dapo"], old_logprobs=None, skip_idle=skip_idle).loss.backward()
            assert gradient.call_args.args[0].shape[0] == rows


@case(2)
def differentiable_once(group: dist.ProcessGroup) -> None:
    split = Split(group, (6, 7), Problem.make())
    hidden = split.mine["hidden"]
    (gradient,) = torch.autograd.grad(split.run().logprobs.sum(), hidden, create_graph=True)
    with refused("linear_token_logprobs", "once", error=RuntimeError):
        gradient.sum().backward()


@case(2)
def frozen_parts_and_layouts(group: dist.ProcessGroup) -> None:
    """One rank's part of the head frozen, the other's not, and its hidden states lie otherwise."""
    split = Split(group, (6, 7), Problem.make())
    wanted = split.gradients(split.alone(), split.whole)
    leaves = dict(split.mine)
    if dist.get_rank() == 1:
        leaves["hidden"] = leaves["hidden"].detach().t().contiguous().t().requires_grad_()
        leaves.pop("weight").requires_grad_(False)
    found = split.gradients(split.run(hidden=leaves["hidden"]), leaves)
    torch.testing.assert_close(found, wanted[: len(found)], **EXACT)


def run_cases(rank: int, names: Iterable[str]) -> dict[str, str]:
    """What one rank does: the error of each case, an empty text if there was none."""
    groups = {size: dist.new_group(list(range(size))) for size in SPLITS}
    errors = {}
    for name in names:
        world, run = CASES[name]
        if rank >= world:
            continue
        try:
            run(groups[world])
            errors[name] = ""
        except BaseException as error:
            errors[name] = traceback.format_exc()
            # The others may be waiting in a collective: these no longer belong together.
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
            break
    return errors


Errors = list[dict[str, str]]


@pytest.fixture(scope="module")
def of_threads() -> Iterator[Errors]:
    """Of each rank, by case."""
    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    store, errors = dist.HashStore(), [{} for _ in range(WORLD)]

    def work(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=WORLD, store=store)
        errors[rank] = run_cases(rank, [name for name in CASES if name not in OF_PROCESSES])

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(WORLD)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        yield errors
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """Of each rank, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [Forked(__name__, rank, folder, TRITON_INTERPRET="1") for rank in range(WORLD)]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    codes = [process.returncode for process in processes]
    assert all(file.exists() for file in files), "\n".join([f"ended with {codes}", *outputs])
    return [json.loads(file.read_text()) for file in files]


def check_case(name: str, errors: Errors) -> None:
    for rank in range(CASES[name][0]):
        error = errors[rank].get(name, "not reached, because an earlier case failed")
        assert not error, f"rank {rank}: {error}"


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_PROCESSES])
def test_ranks(name: str, of_threads: Errors) -> None:
    check_case(name, of_threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PROCESSES)
def test_ranks_that_are_processes(name: str, of_processes: Errors) -> None:
    check_case(name, of_processes)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    errors = run_cases(rank, OF_PROCESSES)
    (folder / f"{rank}.json").write_text(json.dumps(errors))
    if not any(errors.values()):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
