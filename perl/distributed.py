"""What the processes of one run agree on: they all take a step, or none does; and what asks them to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch

from perl.missing import Peers
from perl.timing import span
from perl.types import RunFailed, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT = timedelta(seconds=float(os.environ.get("PERL_TIMEOUT", "7200")))
"""Rollouts of one process may take much longer than another's."""
_LEFT = 20.0
"""Seconds that a process has to end by itself when another one has ended and it is told to."""

_peers: Peers | None = None


class Processes:
    """Reductions over the processes of a run; with a single one they cost nothing."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.error: BaseException | None = None
        """This process's own error that `jointly` has stopped all processes for."""

    def total(self, *counts: float) -> list[float]:
        """Each count summed over all processes."""
        if self.count == 1:
            return [float(c) for c in counts]
        values = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
        with span("sync"):  # The wait for the slowest of them.
            return self.accelerator.reduce(values, "sum").tolist()

    def every(self, flag: bool) -> bool:
        """Whether it is true in all processes."""
        return self.total(not flag)[0] == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return self.total(flag)[0] > 0

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes one after the other, of anything that can be pickled."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def exchange(self, moves: Sequence[tuple[int, int]], leaving: Sequence[T]) -> list[T]:
        """Send things to the processes they go to; all take part.

        Args:
            moves: from which process to which each thing goes that moves, the same in all processes.
            leaving: this process's things among them, in that order.

        Returns:
            What came.
        """
        from torch.distributed import recv_object_list, send_object_list

        out, mine = [], iter(leaving)
        # In the same sequence in all processes, to avoid a deadlock.
        for source, target in moves:
            if self.index == source:
                send_object_list([next(mine)], target)
            elif self.index == target:
                box: list[Any] = [None]
                recv_object_list(box, source)
                out.append(box[0])
        return out

    @contextmanager
    def jointly(self) -> Iterator[None]:
        """A block without reductions after which every process goes on, or all stop for one's error.

        Raises:
            Exception: this process's own.
            UserError: points to the process that had one.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        except SystemExit as left:
            error = called_exit(left)
        failed = self.any(error is not None)
        if error is not None:
            self.error = error
            error.__dict__["stops_all"] = True
            raise error
        if failed:
            raise UserError("another process of this run stopped; its message says why")

    def share(self, error: BaseException) -> bool:
        """Whether all processes stop for this error: one of `jointly`, or a UserError, which by convention all raise.

        Any other is this process's alone. The others wait for it in a reduction, so that it must reduce nothing any more.
        """
        return self.count == 1 or error is self.error or isinstance(error, UserError)


def called_exit(left: SystemExit) -> RuntimeError:
    """The error that stands for the exit() of a library or a reward: no run may end as if it were done."""
    return RuntimeError(f"something called exit({left.code!r})").with_traceback(left.__traceback__)


def process_state() -> Any:
    """accelerate's view of this run's processes, which connect on the first call."""
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    # Gloo beside NCCL: what lies in the host's memory is reduced too. accelerate takes a backend of several processes alone.
    several = cuda and "LOCAL_RANK" in os.environ
    backend = {"backend": "cuda:nccl,cpu:gloo"} if several else {}
    state = PartialState(cpu=not cuda, timeout=_TIMEOUT, **backend)
    _find_peers(state)
    return state


def _find_peers(state: Any) -> None:
    from torch.distributed import distributed_c10d, is_initialized

    global _peers
    if _peers is None and state.num_processes > 1 and is_initialized():
        store = distributed_c10d._get_default_store()
        _peers = Peers(store, state.process_index, state.num_processes)


@contextmanager
def naming_missing() -> Iterator[None]:
    """A block whose error tells which process is missing, where that is its reason.

    Raises:
        RunFailed: in place of that error, with its notes.
    """
    try:
        yield
    except Exception as error:
        shared = isinstance(error, UserError | RunFailed) or "stops_all" in error.__dict__
        reason = None if shared or _peers is None else _peers.reason(error)
        if reason is None:
            raise
        failed = RunFailed(reason)
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error


def all_processes() -> Processes:
    """Of this run, before there is an Accelerator."""
    return Processes(_Reducer(process_state()))


def second_group() -> Any:
    """A group of all processes that works on the host, beside the one of the run; None if there is only one process."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.is_initialized() else None


def on_main_process(action: Callable[[], object]) -> None:
    """Do something in the first process while the others wait; its error stops all of them. Nothing in it may wait for them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        action()
        return
    processes = all_processes()
    with processes.jointly():
        if processes.index == 0:
            action()


def warn_if_alone() -> None:
    """Say so if `accelerate launch` was asked for several processes and started one, as it does on the CPU.

    Its launcher of one process sets an address to meet at only if several were asked for.
    """
    started = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}
    launched = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    if launched and not started & os.environ.keys():
        logger.warning(
            "accelerate launch was asked for several processes and has started ONE, as it does on the CPU; "
            "for several start torchrun --nproc-per-node N -m perl ..."
        )


def shutdown() -> None:
    """Shut down the process group, if there is one. Rank 0 leaves last, as it hosts the store: a process whose
    connection to it breaks while it ends may abort."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    # One that has died does not come.
    with suppress(RuntimeError):
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timedelta(seconds=10))
        dist.destroy_process_group()


class _Reducer:
    """The part of an Accelerator that `Processes` uses, before there is one."""

    def __init__(self, state: Any) -> None:
        self.num_processes, self.process_index = state.num_processes, state.process_index
        self.device = state.device

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        from accelerate.utils import reduce

        return reduce(values, reduction)  # type: ignore[return-value]


class StopSignal:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `requested`; a second one stops at once."""

    _signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        self.ending = False
        """Whether the run ends already, and saves what it has."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        if _peers is not None:
            self._watch(_peers)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if _peers is not None:
            signal.set_wakeup_fd(-1)

    def _watch(self, peers: Peers) -> None:
        """End a process that does not come to its handlers: it may wait for one that has ended, in a call of NCCL's."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

        def watch() -> None:
            while number := ours.recv(1):
                if number[0] == signal.SIGTERM and peers.ended():
                    time.sleep(_LEFT)
                    print(f"perl-rl: {peers.reason(None)}", file=sys.stderr, flush=True)
                    os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
        self._wakeup = theirs

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # torchrun ends the others so when a process has ended.
        if number == signal.SIGTERM and _peers is not None and _peers.ended():
            if not self.ending and (reason := _peers.reason(None)):
                raise RunFailed(reason)
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(
            "\nstopping after this step, with a checkpoint; once more to stop at once",
            file=sys.stderr,
        )
