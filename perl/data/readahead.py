"""Pictures of coming examples, read and encoded by other processes while this one trains.

A row's text is read here, its images there: no process but this one knows the data set.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from queue import Empty, LifoQueue
from typing import Any, NamedTuple

import torch
from PIL import Image

from perl.data.dataset import Dataset, RowDataset, Stored
from perl.model.processor import ENCODED
from perl.permutation.alike import content_key
from perl.types import EncodedImage, Example, UserError, one_line

log = logging.getLogger(__name__)

AHEAD_BYTES = 2**31
"""Most bytes of pictures and pixels that wait to be drawn, by the mean of what was read so far."""
TIMEOUT = 120.0
"""Seconds in which a worker has to read a row's images."""
_START = 300.0
"""Seconds in which it has to import what it needs."""

Encode = Callable[[Image.Image], EncodedImage]

# One server imports what a worker needs, and each worker is a fork of it: their memory is one, and none is a fork of a
# process with threads or a GPU.
_PROCESSES = multiprocessing.get_context("forkserver")


def warm_up(encode: Any) -> None:
    """Have the workers' server import what they need, which takes seconds, while this process does something else."""
    image_processor = getattr(encode, "image_processor", None)
    _PROCESSES.set_forkserver_preload([__name__, type(image_processor).__module__])
    forkserver.ensure_running()


class Read(NamedTuple):
    """Pictures with their content's key and their `EncodedImage` on them, and their bytes."""

    images: tuple[Image.Image, ...]
    nbytes: int


class ReadAhead:
    """Reads the pictures of upcoming examples in worker processes, and gives the examples as the data set would.

    As many are read ahead as `upcoming` tells, and as many as `AHEAD_BYTES` hold. What cannot be read there is read here,
    with the error that it has. A worker that dies or takes too long is replaced, and the row tried once more.

    Args:
        workers: processes.
        encode: from a picture to the tower's input; None: pictures are only opened.
        device: that the pixels will be copied to.
    """

    upcoming: Callable[[], Iterator[tuple[Dataset, int]]]
    """What will be read next, from the very next on."""

    def __init__(self, workers: int, encode: Encode | None, device: torch.device) -> None:
        self.workers, self.encode = workers, encode
        self._pin = device.type == "cuda"
        # A thread waits for each worker.
        begin = partial(torch.cuda.set_device, device) if self._pin else None
        self._threads = ThreadPoolExecutor(workers, "read ahead", begin)
        self._idle = LifoQueue[Worker]()
        self._running = set[Worker]()
        self._closed = False
        self._coming: dict[tuple[Dataset, int], tuple[Example, Future[Read | None]]] = {}
        self._rows_read = self._bytes_read = 0

    def read(self, dataset: Dataset, i: int) -> Example:
        """Example i, as `dataset[i]`."""
        if (dataset, i) not in self._coming:
            self.begin()
        example, coming = self._coming.pop((dataset, i), (None, None))
        read = None
        with suppress(CancelledError):  # The workers have been ended.
            read = coming and coming.result()
        if not example or not read:
            return dataset[i]
        self._rows_read, self._bytes_read = self._rows_read + 1, self._bytes_read + read.nbytes
        return replace(example, images=read.images)

    def begin(self) -> None:
        """Have what comes next read, and let go of what does not come."""
        wanted = [(dataset, i) for dataset, i in self.upcoming() if isinstance(dataset, RowDataset)]
        for key in self._coming.keys() - set(wanted):
            self._coming.pop(key)[1].cancel()
        for dataset, i in wanted:
            if (dataset, i) in self._coming:
                continue
            if self._closed or not self._has_room():
                break
            # A row's error is raised where it is read; and the workers may have been ended by one that did not start.
            with suppress(UserError, RuntimeError):
                example, stored = dataset.unopened(i)
                self._coming[dataset, i] = example, self._threads.submit(self._read, stored)

    def close(self) -> None:
        """End the workers; what is asked for later is read here."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._running):
            worker.kill()

    def _has_room(self) -> bool:
        if not self._rows_read:  # Nobody knows yet how large they are.
            return len(self._coming) < 2 * self.workers
        return (len(self._coming) + 1) * self._bytes_read <= AHEAD_BYTES * self._rows_read

    def _read(self, stored: Stored) -> Read | None:
        """In a thread: what a worker makes of a row's images; None if they are to be read here.

        Raises:
            UserError: two workers have died of them or hung.
        """
        how = ""
        for _ in range(2):
            worker = self._worker()
            if worker is None:
                return None
            try:
                read = worker.read(stored, self._pin)
            except (OSError, EOFError) as error:  # TimeoutError is an OSError.
                self._running.discard(worker)
                how = worker.kill(error)
                if self._closed:
                    return None
                log.warning("%s: the process that read its images %s", stored.where, how)
            else:
                self._idle.put(worker)
                return read
        error = UserError(
            f"{stored.where}: two processes that were to read its images are gone, the last {how}; replace the images, or "
            "set data.workers = 0 to read them in the run's own process"
        )
        error.kind = "image"
        raise error

    def _worker(self) -> Worker | None:
        """One that has nothing to do, or a new one; None if none can be had any more."""
        with suppress(Empty):
            while True:
                worker = self._idle.get_nowait()
                if not worker.ended:
                    return worker
                self._running.discard(worker)
        try:
            worker = Worker(self.encode)
        except (OSError, EOFError) as error:
            if not self._closed:
                log.warning(
                    "data.workers: a process that reads pictures ahead did not start (%s; it imports the script that runs, "
                    "which needs if __name__ == '__main__'), so they are read in the run's own process from now on",
                    one_line(error) or type(error).__name__,
                )
                self.close()
            return None
        self._running.add(worker)
        if self._closed:
            worker.kill()
        return worker


class Worker:
    """A process that reads the images of one row after the other: `_work`."""

    def __init__(self, encode: Encode | None) -> None:
        self._connection, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_work, args=(theirs, encode), daemon=True)
        self._process.start()
        theirs.close()
        self._wait(_START)
        self._connection.recv()

    def read(self, stored: Stored, pin: bool) -> Read | None:
        """What it makes of the images, the pixels in pinned memory or not; None if something is wrong with them.

        Raises:
            TimeoutError: it does not come back.
            OSError, EOFError: it has died.
        """
        self._connection.send(stored)
        self._wait(TIMEOUT)
        answer = self._connection.recv()
        if answer is None:
            return None
        encoded, pictures = answer
        ready: dict[str, EncodedImage] = {}
        for image, shape, dtype in encoded:
            pixels = torch.empty(shape, dtype=dtype, pin_memory=pin)
            self._fill(pixels.view(-1).view(torch.uint8).numpy().data)
            ready[image.key] = replace(image, pixel_values=pixels)
        out, nbytes = [], sum(image.pixel_values.nbytes for image in ready.values())
        for size, info, key in pictures:
            rgb = bytearray(3 * size[0] * size[1])
            self._fill(memoryview(rgb))
            picture = Image.frombytes("RGB", size, rgb)
            picture.info = info
            vars(picture).update({"content_key": key, ENCODED: ready.get(key)})
            out.append(picture)
            nbytes += len(rgb) * 4 // 3  # Pillow gives a pixel four bytes.
        return Read(tuple(out), nbytes)

    @property
    def ended(self) -> bool:
        """Whether it, which has nothing to do, is not there any more: then its end of the connection is closed."""
        return self._connection.poll()

    def kill(self, error: BaseException | None = None) -> str:
        """End it; how it ended, if it had by itself with this error."""
        if not isinstance(error, TimeoutError):
            self._process.join(1 if error else 0)
        code = self._process.exitcode
        self._process.kill()
        if code is None:
            return f"took over {TIMEOUT:g} seconds"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"

    def _fill(self, memory: memoryview) -> None:
        while memory:
            self._wait(TIMEOUT)
            count = os.readv(self._connection.fileno(), [memory])
            if not count:
                raise EOFError
            memory = memory[count:]

    def _wait(self, seconds: float) -> None:
        if not self._connection.poll(seconds):
            raise TimeoutError


def _work(connection: Any, encode: Encode | None) -> None:
    """In a worker: reads images until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGHUP):  # They are the first process's business.
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with suppress(EOFError, OSError):
        connection.send("ready")
        while True:
            stored = connection.recv()
            try:
                answer, memories = _packed(stored.open(), encode)
            except Exception:  # The first process meets it too, and tells it.
                answer, memories = None, []
            connection.send(answer)
            for memory in memories:
                while memory:
                    memory = memory[os.write(connection.fileno(), memory) :]


def _packed(
    images: Sequence[Image.Image], encode: Encode | None
) -> tuple[tuple[list[Any], list[Any]], list[memoryview]]:
    """What `Worker.read` takes: of each content its `EncodedImage`, then each picture; and their bytes in that sequence."""
    distinct = {content_key(image): image for image in images}
    encoded = [encode(image) for image in distinct.values()] if encode else []
    pixels = [image.pixel_values.contiguous() for image in encoded]
    answer = (
        [
            (replace(image, pixel_values=None), values.shape, values.dtype)
            for image, values in zip(encoded, pixels, strict=True)
        ],
        [(image.size, image.info, content_key(image)) for image in images],
    )
    memories = [values.view(-1).view(torch.uint8).numpy().data for values in pixels]
    return answer, [*memories, *(memoryview(image.tobytes()) for image in images)]
