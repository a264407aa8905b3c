"""What goes wrong between a trainer and a real vLLM server, done on purpose, and what happens.

    python -m benchmarks.vllm_faults --vllm ~/vllm/bin/vllm        # a table in Markdown; minutes

A tiny Qwen2.5-VL whose weights differ from those the server began with; prompts over three pictures in two orders, of 24
completions each. Every completion that comes is compared with the trainer's log-probs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import torch

from perl.config import Config, DataConfig, ModelConfig, RolloutConfig
from perl.data.tasks import vocabulary
from perl.model.loading import load_policy, load_processor
from perl.model.tiny import make_tiny_model
from perl.rollout.engine import SamplingParams
from perl.rollout.vllm import weights
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.rollout.vllm.serve import OwnServer, launch
from perl.types import RunFailed, one_line
from tests.stand_ins import processes
from tests.vllm_checks import apart, changed, prompt

PARAMS = SamplingParams(n=24, temperature=1.0, max_new_tokens=200)


class Case:
    """A server, and an engine that asks it."""

    def __init__(self, folder: Path, vllm: str, timeout: float = 120.0, ours: bool = True) -> None:
        config = Config(
            model=ModelConfig(path=str(folder)),
            data=DataConfig(max_prompt_tokens=800),
            rollout=RolloutConfig(vllm=vllm, max_new_tokens=200),
        )
        made = launch(config, str(folder), "float32", "files", cuda=False)
        self.own = OwnServer(made, folder / "log", 300.0)
        self.own.start()
        self.policy = load_policy(str(folder), config.model, torch.device("cpu"))
        self.processor = load_processor(str(folder), config.model)
        self.own.wait()
        self.url = made.url
        server = Server(self.url, None, timeout, 64, self.own if ours else None)
        self.engine = VLLMEngine([server], self.policy, self.processor, processes())
        self.prompts = [prompt(self.processor, 0, 1, 2), prompt(self.processor, 2, 0, 1)]
        changed(self.policy)
        with self.engine.serving(1):
            self.engine.generate(self.prompts[:1], PARAMS, 0)
        self.engine.counts()

    def pid(self) -> int:
        assert self.own._process is not None
        return self.own._process.pid

    def outcome(self, plant: Callable[[], None], version: int = 1) -> str:
        """What comes of two prompts where something happens soon after they were sent."""
        began = time.monotonic()

        def soon() -> None:
            time.sleep(0.3)
            plant()
            time.sleep(3600)  # A server ends with the thread that has started it.

        threading.Thread(target=soon, daemon=True).start()
        try:
            with self.engine.serving(version):
                found = self.engine.generate(self.prompts, PARAMS, 0)
        except RunFailed as error:
            return f"stops after {time.monotonic() - began:.0f} s: {one_line(error, 300)}"
        most = max(
            apart(self.policy, self.processor, p, c)
            for p, c in zip(self.prompts, found, strict=True)
        )
        counts, number = self.engine.counts(), sum(map(len, found))
        return (
            f"goes on after {time.monotonic() - began:.0f} s: {number} of 48 completions, \\|Δ log p\\| at most {most:.0e}, "
            f"{counts['rollout/retried']:.0f} requests made again"
        )

    def close(self) -> None:
        self.engine.close()
        self.own.stop()


def restarted(case: Case) -> Callable[[], None]:
    """As a user does it: killed, and started again with the model that it began with."""

    def plant() -> None:
        os.killpg(case.pid(), signal.SIGKILL)
        case.own.restart()

    return plant


def dropped(case: Case) -> Callable[[], None]:
    def plant() -> None:
        for route in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
            httpx2.post(f"{case.url}/{route}", timeout=60)

    return plant


def other_weights(case: Case) -> Callable[[], None]:
    def plant() -> None:
        httpx2.post(
            f"{case.url}/update_weight_version", json={"new_version": "other-9"}, timeout=60
        )

    return plant


def killed(case: Case) -> Callable[[], None]:
    return lambda: os.killpg(case.pid(), signal.SIGKILL)


def stopped(case: Case) -> Callable[[], None]:
    return lambda: os.killpg(case.pid(), signal.SIGSTOP)


def nothing(case: Case) -> Callable[[], None]:
    return lambda: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", default="vllm")
    parser.add_argument("--only", default="", help="cases whose name has this")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    cases: dict[str, tuple[dict[str, Any], Callable[[Case], Callable[[], None]]]] = {
        "nothing": ({}, nothing),
        "its picture cache is cleared": ({}, dropped),
        "another run's version": ({}, other_weights),
        "kill -9, started by the run": ({}, killed),
        "hangs (SIGSTOP), started by the run": ({"timeout": 15.0}, stopped),
        "kill -9, of the user's, who starts it again with its old weights": (
            {"ours": False},
            restarted,
        ),
        "kill -9, of the user's, who does not": ({"ours": False, "timeout": 15.0}, killed),
        "hangs, of the user's": ({"ours": False, "timeout": 15.0}, stopped),
    }
    print("| what | what happens |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        make_tiny_model("tiny-qwen2.5-vl", vocabulary("digits"), folder, 0)
        for name, (how, plant) in cases.items():
            if options.only in name:
                case = Case(folder, options.vllm, **how)
                print(f"| {name} | {case.outcome(plant(case))} |", flush=True)
                case.close()
        if options.only in "full":
            case = Case(folder, options.vllm)
            small = Path(scratch) / "small"
            small.mkdir()
            if os.system(f"mount -t tmpfs -o size=1m tmpfs {small}") == 0:
                weights.SHARED = small
                print(f"| no room for the weights | {case.outcome(lambda: None, 2)} |", flush=True)
                os.system(f"umount {small}")
            weights.SHARED = Path("/dev/shm")
            send = weights.FileTransfer.write

            def emptied(self: Any) -> None:
                send(self)
                for file in self.folder.glob("*.safetensors"):
                    file.unlink()

            weights.FileTransfer.write = emptied  # type: ignore[method-assign]
            print(f"| an update that fails | {case.outcome(lambda: None, 3)} |", flush=True)
            paused = httpx2.get(f"{case.url}/is_paused", timeout=60).json()
            print(f"| ... the server afterwards | {paused} |", flush=True)
            case.close()


if __name__ == "__main__":
    main()
