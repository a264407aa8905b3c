"""Runs whose processes are killed: who of the others says what, how soon they end, and what the run goes on with.

    python -m benchmarks.kill                       # the whole matrix, a table in Markdown
    python -m benchmarks.kill --processes 2 --sharding fsdp --at step

The last process is killed (kill -9), or stopped (kill -STOP), in its second RL step or while it writes the checkpoint behind it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
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
LAST = os.environ.get("RANK") == os.environ.get("KILL_RANK") and not os.environ.get("KILL_NOT")

def end():
    os.kill(os.getpid(), getattr(signal, os.environ["KILL_BY"]))

def stepped(self, number, *arguments):
    steps.append(number)
    if LAST and number == 1 and os.environ["KILL_AT"] == "step":
        end()
    return step(self, number, *arguments)

def saved(*arguments, **options):
    if LAST and len(steps) > 1 and os.environ["KILL_AT"] == "checkpoint":
        end()
    return save(*arguments, **options)

Optimizer.step, safetensors.torch.save = stepped, saved

def f(prompts, completions, **columns):
    return [len(c.split()) % 3 / 2 for c in completions]
"""
OPTIONS = (
    "--run.checkpoint-every 1 --cold-start.steps 0 --permutation.orders 2 --rollout.per-order 2 "
    "--rollout.max-new-tokens 6 --train.examples-per-step 4 --train.tokens-per-micro-batch 128 --eval.examples 0 "
    "--run.trackers --run.seeds --run.seed 0 --train.steps 3"
)


def start(count: int, environment: dict[str, str], *arguments: object) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "perl", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment | shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(count)
    ]


def case(root: Path, on: list[int], count: int, sharding: str, at: str, by: str) -> str:
    folder, reward = root / "run", root / "reward.py"
    reward.write_text(REWARD)
    environment = {"KILL_RANK": str(count - 1), "KILL_AT": at, "KILL_BY": by}
    if by == "SIGSTOP":
        environment["PERL_TIMEOUT"] = "60"
    given = ("--reward.functions", f"{reward}:f", "--reward.weights", "1")
    options = (*OPTIONS.split(), "--train.sharding", sharding, "--run.dir", folder)
    processes = start(count, environment, "train", "demo", *given, *options)
    ended = None
    while any(p.poll() is None for p in processes[:-1]):
        if ended is None and (processes[-1].poll() is not None or _stopped(processes[-1].pid)):
            ended = time.monotonic()
        time.sleep(0.05)
    waited = time.monotonic() - ended if ended else float("nan")
    processes[-1].kill()
    outs = [p.communicate()[0] for p in processes]
    named = f"process {count - 1} of {count}"
    errors = [[li for li in out.splitlines() if li.startswith("error: ")] for out in outs[:-1]]
    said = sum(len(e) == 1 and named in e[0] and "perl-rl resume" in e[0] for e in errors)
    traces = sum("Traceback" in out for out in outs)
    codes = sorted({p.returncode for p in processes[:-1]})
    left = [int(re.sub(r"\D", "", p.name)) for p in folder.glob("checkpoints/step-*")]
    if said < count - 1 or traces:
        for index, out in enumerate(outs):
            print(f"--- {index}\n{out[-1500:]}", file=sys.stderr)
    resumed = []
    for others in on:
        copy = root / f"again-{others}"
        shutil.copytree(folder, copy)
        if sharding == "fsdp" and others == 1:
            text = (copy / "config.toml").read_text()
            (copy / "config.toml").write_text(
                text.replace('sharding = "fsdp"', 'sharding = "none"')
            )
        again = start(others, environment | {"KILL_NOT": "1"}, "resume", copy)
        outs = [p.communicate()[0] for p in again]
        good = all(p.returncode == 0 for p in again)
        if not good:
            print(f"--- resume {others}\n{outs[0][-1500:]}", file=sys.stderr)
        lines = (copy / "metrics.jsonl").read_text().splitlines()
        rows = [r for r in map(json.loads, lines) if r["stage"] == "rl"]
        ok = good and [r["step"] for r in rows] == [1, 2, 3]
        resumed.append(f"{rows[-1]['loss']:.7f}" if ok else "failed")
        shutil.rmtree(copy)
    return (
        f"| {count} | {sharding} | {at} | {by} | {waited:.1f} s | {codes} | {said} of {count - 1} | {traces} | "
        f"{sorted(left)} | {' '.join(resumed)} |"
    )


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--sharding", nargs="*", default=["none", "fsdp"])
    parser.add_argument("--at", nargs="*", default=["step", "checkpoint"])
    parser.add_argument("--by", nargs="*", default=["SIGKILL", "SIGSTOP"])
    parser.add_argument("--resume", type=int, nargs="*", default=[1, 2, 4])
    chosen = parser.parse_args()
    print(
        "| processes | sharding | in | by | ended after | codes | name it | traces | checkpoints | loss of step 3, as resumed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in itertools.product(chosen.processes, chosen.sharding, chosen.at, chosen.by):
        with tempfile.TemporaryDirectory() as root:
            print(case(Path(root), chosen.resume, *each), flush=True)


if __name__ == "__main__":
    main()
