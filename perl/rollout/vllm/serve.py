"""vLLM servers of our own: with the flags that a run needs, and no longer there than the run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from perl.config import Config
from perl.rollout.vllm.client import KEY, MODEL
from perl.types import RunFailed, UserError, one_line

IMAGES = 16
"""Most images of a prompt; `rollout.serve_args` can say another number."""
TESTED = "0.32"
"""The versions that were run; 0.33 was only read."""
_ENDS = 20.0
"""Seconds that a server has to end by itself."""
_WITH_ITS_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""It is sent SIGTERM (15) when the process that started it ends, however that ends (PR_SET_PDEATHSIG is 1); or the thread, so
that one that starts it has to stay."""


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """What it gets beside this process's own."""
    url: str

    def in_shell(self) -> str:
        """One line for a shell; the key is left for the environment."""
        told = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*told, shlex.join(self.command)])


def launch(
    config: Config,
    model: str,
    dtype: str,
    transfer: str,
    cuda: bool,
    port: int = 0,
    host: str = "127.0.0.1",
) -> Launch:
    """The server that a run with this config samples on.

    Args:
        model: folder or hub name.
        dtype: that the trainer computes in.
        transfer: how weights come: files, nccl or ipc.
        cuda: whether it has GPUs.
        port: 0: one that is free.

    Raises:
        UserError: there is no such executable, or it is to listen beyond this machine without a key.
    """
    rollout = config.rollout
    executable = shutil.which(rollout.vllm)
    if executable is None:
        raise UserError(
            f"rollout.vllm = {rollout.vllm} is no executable; install vLLM in an environment of its own (python -m venv "
            "~/vllm && ~/vllm/bin/pip install vllm) and give --rollout.vllm ~/vllm/bin/vllm, or name servers with --rollout.url"
        )
    if host not in ("127.0.0.1", "localhost") and not os.environ.get(KEY):
        raise UserError(
            f"--host {host} lets other machines in: set {KEY} to a secret, here and where the run is started"
        )
    port = port or _free_port()
    pixels = {"min_pixels": config.model.min_pixels, "max_pixels": config.model.max_pixels}
    completions = max(rollout.per_order * config.permutation.orders, 256)
    command = [
        *(executable, "serve", model, "--served-model-name", MODEL),
        *("--host", host, "--port", str(port), "--dtype", dtype),
        *("--max-model-len", str(_longest(config, model))),
        *("--max-num-seqs", str(completions), "--enable-prefix-caching"),
        *("--enable-scale-out", "--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm"),
        *("--mm-processor-kwargs", json.dumps(pixels)),
        *("--limit-mm-per-prompt", json.dumps({"image": IMAGES, "video": 0})),
        *("--weight-transfer-config", json.dumps({"backend": _BACKENDS[transfer]})),
    ]
    environment = {
        "PYTHONPATH": str(plugin_folder()),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if transfer == "ipc":
        # Handles of GPU memory come pickled, from this trainer over the loopback.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if cuda:
        command += ["--gpu-memory-utilization", str(rollout.gpu_memory)]
        if rollout.placement == "colocated":
            command += ["--enable-sleep-mode"]
        if rollout.devices:
            environment["CUDA_VISIBLE_DEVICES"] = rollout.devices
    else:
        command += ["--enforce-eager"]
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command += rollout.serve_args
    reached = "127.0.0.1" if host in ("0.0.0.0", "localhost") else host
    return Launch(command, environment, f"http://{reached}:{port}")


def _longest(config: Config, model: str) -> int:
    """Most tokens of a prompt and its completion, as far as the model goes."""
    from transformers import AutoConfig

    wanted = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    try:
        text = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path = {model}: its config cannot be read ({one_line(error)})"
        ) from error
    return min(wanted, getattr(text, "max_position_embeddings", None) or wanted)


_BACKENDS = {"files": "perl", "nccl": "nccl", "ipc": "ipc"}


def plugin_folder() -> Path:
    """A folder that shows a vLLM of another environment this package's plug-in, and nothing else of this environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "perl-rl" / "vllm-plugin"
    info = folder / "perl_rl-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: perl-rl\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nperl = perl.rollout.vllm.plugin:register\n"
    )
    package, link = Path(__file__).resolve().parents[2], folder / "perl"
    if not link.is_symlink() or link.readlink() != package:
        link.unlink(missing_ok=True)
        link.symlink_to(package)
    return folder


class OwnServer:
    """A server that is started, stopped and started again.

    Args:
        log: where all that it says goes.
        timeout: seconds that it may take to begin.
    """

    def __init__(self, launch: Launch, log: Path, timeout: float) -> None:
        self.launch, self.log, self.timeout = launch, log, timeout
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start it."""
        key = os.environ.get(KEY)
        environment = {**os.environ, **self.launch.environment}
        environment |= {"VLLM_API_KEY": key} if key else {}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WITH_ITS_PARENT, *self.launch.command],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RunFailed: it ended, or took too long.
        """
        assert self._process is not None
        until = time.monotonic() + self.timeout
        while self._process.poll() is None:
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.launch.url}/health", timeout=5).status_code == 200:
                    return
            if time.monotonic() > until:
                self.stop()
                raise RunFailed(
                    f"vLLM has not begun to answer within {self.timeout:g} seconds (rollout.timeout); see {self._kept()}"
                )
            time.sleep(0.25)
        raise RunFailed(
            f"vLLM has not started: {_last_words(self.log)} (all of it: {self._kept()})"
        )

    def _kept(self) -> Path:
        """The log where it stays: a run that has not begun leaves no folder."""
        kept = Path(tempfile.gettempdir()) / f"perl-rl-vllm-{os.getpid()}.log"
        shutil.copyfile(self.log, kept)
        return kept

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait()

    def stop(self) -> None:
        """With all processes of its own."""
        process, self._process = self._process, None
        if process is None:
            return
        for by in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, by)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS)
                break
        # Those of its processes that have outlived it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _last_words(log: Path) -> str:
    """What a server said last that is an error, or else at all."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if "Error" in line]
    # What some say stands on the lines behind it.
    return one_line(
        " ".join(lines[errors[-1] :][:3] if errors else lines[-1:]) or "it said nothing", 400
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
