"""Runs whose processes are killed: who of the others says what, how soon they end, and what the run goes on with.

    python -m benchmarks.kill                       # the whole matrix, a table in Markdown; minutes a row on two cores
    python -m benchmarks.kill --processes 2 --sharding fsdp --at step --torchrun

One process is killed (kill -9), or stopped (kill -STOP), in its second RL step or while it writes the checkpoint behind it: the
last one, or with --first the one that hosts the store and writes the records. With --torchrun it is torchrun that starts the
processes, and ends the others as soon as one has ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REWARD = """
import os, signal
import safetensors.torch
from perl.training.optimizer import Optimizer

step, save, steps = Optimizer.step, safetensors.torch.save, []
HERE = os.environ.get("RANK") == os.environ.get("KILL_RANK") and not os.environ.get("KILL_NOT")

def end():
    open(os.environ["KILL_MARK"] + "-", "w").write(str(os.getpid()))
    os.rename(os.environ["KILL_MARK"] + "-", os.environ["KILL_MARK"])
    os.kill(os.getpid(), getattr(signal, os.environ["KILL_BY"]))

def stepped(self, number, *arguments):
    steps.append(number)
    if HERE and number == 1 and os.environ["KILL_AT"] == "step":
        end()
    return step(self, number, *arguments)

def saved(*arguments, **options):
    if HERE and len(steps) > 1 and os.environ["KILL_AT"] == "checkpoint":
        end()
    return save(*arguments, **options)

Optimizer.step, safetensors.torch.save = stepped, saved

def f(prompts, completions, **columns):
    return [len(c.split()) % 3 / 2 for c in completions]
"""
OPTIONS = (
    "--run.checkpoint-every 1 --cold-start.steps 0 --permutation.orders 2 --rollout.per-order 2 "
    "--rollout.max-new-tokens 4 --train.examples-per-step 4 --train.tokens-per-micro-batch 128 --eval.examples 0 "
    "--run.trackers --run.seeds --run.seed 0 --train.steps 3"
)
LIMIT = 600
"""Seconds, of a run that takes 10 to 60 on an idle machine: one that has not ended then hangs."""


def start(
    folder: Path, count: int, torchrun: bool, environment: dict[str, str], *arguments: object
) -> list[subprocess.Popen]:
    """The processes of a run, or torchrun's own; what each says goes to a file of its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    perl = ["-m", "perl", *map(str, arguments)]
    if torchrun:
        # --tee would print the lines a second time, with prefixes.
        agent = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "-r", "3"]
        agent += ["--master-port", port, "--log-dir", str(folder / "logs")]
        commands = [([*agent, *perl], shared)]
    else:
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands = [(perl, shared | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(count)]
    out = []
    for number, (command, own) in enumerate(commands):
        with (folder / f"{number}.log").open("w") as log:
            out.append(
                subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=own)
            )
    return out


def outputs(folder: Path, count: int, torchrun: bool) -> list[str]:
    """What each process of a run said, by its number."""
    if not torchrun:
        return [(folder / f"{i}.log").read_text() for i in range(count)]
    found = [sorted((folder / "logs").glob(f"*/attempt_0/{i}/*.log")) for i in range(count)]
    return ["".join(file.read_text() for file in files) for files in found]


def wait(processes: list[subprocess.Popen], until: float) -> bool:
    """Whether they have ended by then; those that have not are killed."""
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.05)
    good = all(p.poll() is not None for p in processes)
    for process in processes:
        process.kill()
        process.wait()
    return good


def case(
    root: Path,
    on: list[int],
    first: bool,
    torchrun: bool,
    count: int,
    sharding: str,
    at: str,
    by: str,
) -> str:
    folder, reward, mark = root / "run", root / "reward.py", root / "victim"
    reward.write_text(REWARD)
    rank = 0 if first else count - 1
    environment = {"KILL_RANK": str(rank), "KILL_AT": at, "KILL_BY": by, "KILL_MARK": str(mark)}
    if by == "SIGSTOP":
        environment["PERL_TIMEOUT"] = "30"
    given = ("--reward.functions", f"{reward}:f", "--reward.weights", "1")
    options = (*OPTIONS.split(), "--train.sharding", sharding, "--run.dir", folder)
    processes = start(root, count, torchrun, environment, "train", "demo", *given, *options)
    others = processes if torchrun else [p for i, p in enumerate(processes) if i != rank]
    until = time.monotonic() + LIMIT
    while not mark.exists() and any(p.poll() is None for p in others) and time.monotonic() < until:
        time.sleep(0.05)
    killed = time.monotonic()
    in_time = wait(others, until)
    waited = f"{time.monotonic() - killed:.1f} s" if in_time and mark.exists() else "HANGS"
    if mark.exists() and by == "SIGSTOP":
        os.kill(int(mark.read_text()), signal.SIGKILL)
    for process in processes:
        process.wait()
    outs = outputs(root, count, torchrun)
    named = f"process {rank} of {count}"
    errors = [
        [li for li in out.splitlines() if li.startswith(("error: ", "perl-rl: "))]
        for i, out in enumerate(outs)
        if i != rank
    ]
    said = sum(len(e) == 1 and named in e[0] for e in errors)
    traces = sum("Traceback" in out for out in outs)
    codes = sorted({p.returncode for p in others})
    left = [int(re.sub(r"\D", "", p.name)) for p in folder.glob("checkpoints/step-*")]
    if said < count - 1 or traces:
        for index, out in enumerate(outs):
            print(f"--- {index}\n{out[-1500:]}", file=sys.stderr)
    resumed = [resume(root, folder, environment, other, sharding) for other in on]
    return (
        f"| {count} | {sharding} | {rank} | {at} | {by} | {waited} | {codes} | {said} of {count - 1} | {traces} | "
        f"{sorted(left)} | {' '.join(resumed)} |"
    )


def resume(root: Path, folder: Path, environment: dict[str, str], count: int, sharding: str) -> str:
    """The loss of step 3 of a copy of the run that goes on with so many processes."""
    copy = root / f"again-{count}"
    shutil.copytree(folder, copy, symlinks=True)
    more = ("--train.sharding", "none") if sharding == "fsdp" and count == 1 else ()
    processes = start(copy, count, False, environment | {"KILL_NOT": "1"}, "resume", copy, *more)
    good = wait(processes, time.monotonic() + LIMIT)
    if not good or any(p.returncode for p in processes):
        print(f"--- resume {count}\n{outputs(copy, count, False)[0][-1500:]}", file=sys.stderr)
        return "failed" if good else "HANGS"
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if r["stage"] == "rl"]
    shutil.rmtree(copy)
    steps = [r["step"] for r in rows]
    return f"{rows[-1]['loss']:.7f}" if steps == [1, 2, 3] else f"steps {steps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--sharding", nargs="*", default=["none", "fsdp"])
    parser.add_argument("--at", nargs="*", default=["step", "checkpoint"])
    parser.add_argument("--by", nargs="*", default=["SIGKILL", "SIGSTOP"])
    parser.add_argument("--resume", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--torchrun", action="store_true")
    chosen = parser.parse_args()
    print(
        "| processes | sharding | who | in | by | others ended after | codes | name it | traces | checkpoints | "
        "loss of step 3, as resumed |"
    )
    print("| --- " * 11 + "|")
    for each in itertools.product(chosen.processes, chosen.sharding, chosen.at, chosen.by):
        with tempfile.TemporaryDirectory() as root:
            row = case(Path(root), chosen.resume, chosen.first, chosen.torchrun, *each)
            print(row, flush=True)


if __name__ == "__main__":
    main()
