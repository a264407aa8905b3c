"""vLLM servers that are started here: their flags, what they say when they do not start, and that they end with the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from perl.config import Config, DataConfig, ModelConfig, RolloutConfig
from perl.rollout.vllm.serve import Launch, OwnServer, launch, plugin_folder
from perl.types import RunFailed
from tests.command_line import run
from tests.messages import refused, tells
from tests.vllm_server import VLLMServer, vllm_server

ANSWERS = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[2], "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server with a process of its own, that writes down both."""


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("tiny-qwen2.5-vl")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def config_of(folder: Path, **rollout: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(folder), max_pixels=50176),
        data=DataConfig(max_prompt_tokens=1000),
        rollout=RolloutConfig(vllm=sys.executable, max_new_tokens=24, **rollout),
    )


def flags(made: Launch) -> dict[str, str]:
    pairs = zip(made.command, [*made.command[1:], ""], strict=True)
    return {flag: value for flag, value in pairs if flag.startswith("--")}


def test_the_flags_of_a_run(folder: Path, cache: Path) -> None:
    made = launch(config_of(folder), str(folder), "float32", "files", False, 8123)
    assert [*made.command[:3]] == [sys.executable, "serve", str(folder)]
    told = flags(made)
    assert (told["--served-model-name"], told["--dtype"]) == ("perl", "float32")
    assert (told["--host"], told["--port"], made.url) == (
        "127.0.0.1",
        "8123",
        "http://127.0.0.1:8123",
    )
    assert (told["--max-model-len"], told["--logprobs-mode"]) == ("1024", "processed_logprobs")
    assert json.loads(told["--mm-processor-kwargs"]) == {"min_pixels": 784, "max_pixels": 50176}
    assert json.loads(told["--weight-transfer-config"]) == {"backend": "perl"}
    assert "--enable-scale-out" in told and "--enable-sleep-mode" not in told
    assert made.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in made.environment
    assert made.in_shell().endswith("--enforce-eager")
    tells(made.in_shell(), "VLLM_SERVER_DEV_MODE=1", "--enable-scale-out")


def test_a_server_on_the_trainers_gpus(folder: Path, cache: Path) -> None:
    config = config_of(folder, placement="colocated", gpu_memory=0.4)
    made = launch(config, str(folder), "bfloat16", "ipc", True)
    told = flags(made)
    assert "--enable-sleep-mode" in told and "--enforce-eager" not in told
    assert told["--gpu-memory-utilization"] == "0.4"
    assert json.loads(told["--weight-transfer-config"]) == {"backend": "ipc"}
    assert made.environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in made.environment


def test_a_model_with_fewer_positions(folder: Path, cache: Path) -> None:
    config = config_of(folder)
    config = replace(config, data=replace(config.data, max_prompt_tokens=9999))
    assert (
        flags(launch(config, str(folder), "float32", "files", False))["--max-model-len"] == "4096"
    )


def test_what_cannot_be_started(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder)
    with refused("--host 0.0.0.0", "PERL_VLLM_API_KEY"):
        launch(config, str(folder), "float32", "files", False, host="0.0.0.0")
    monkeypatch.setenv("PERL_VLLM_API_KEY", "secret")
    made = launch(config, str(folder), "float32", "files", False, 1, "0.0.0.0")
    assert made.url == "http://127.0.0.1:1" and "secret" not in made.in_shell()
    config = replace(config, rollout=replace(config.rollout, vllm="no-such-vllm"))
    with refused("rollout.vllm = no-such-vllm", "--rollout.vllm", "--rollout.url"):
        launch(config, str(folder), "float32", "files", False)


def test_the_plug_in_is_all_that_another_environment_sees(cache: Path) -> None:
    seen = plugin_folder()
    assert plugin_folder() == seen and seen.is_relative_to(cache)
    assert sorted(path.name for path in seen.iterdir()) == ["perl", "perl_rl-0.dist-info"]
    (found,) = distributions(path=[str(seen)])
    (point,) = found.entry_points.select(group="vllm.general_plugins")
    module, function = point.value.split(":")
    source = seen.joinpath(*module.split(".")).with_suffix(".py").read_text()
    assert f"def {function}()" in source


def started(tmp_path: Path, code: str = ANSWERS, timeout: float = 20.0) -> OwnServer:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, str(port), str(tmp_path / "pids")]
    made = OwnServer(Launch(command, {}, f"http://127.0.0.1:{port}"), tmp_path / "log", timeout)
    made.start()
    return made


def gone(pid: int) -> bool:
    """Whether it has ended, within a while."""
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_it_is_stopped_with_its_processes_and_started_again(tmp_path: Path) -> None:
    server = started(tmp_path)
    server.wait()
    first = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    server.restart()
    second = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(gone, first)) and not set(first) & set(second)
    server.stop()
    assert all(map(gone, second))


def test_one_that_ends_says_why(tmp_path: Path) -> None:
    server = started(tmp_path, "print('1 error'); raise ValueError('max_model_len (9) is greater')")
    with refused("max_model_len", "(9)", error=RunFailed) as _:
        server.wait()
    with pytest.raises(RunFailed) as said:
        started(tmp_path, "raise SystemExit('no space')").wait()
    assert Path(str(said.value).rpartition(": ")[2].rstrip(")")).exists()


def test_one_that_never_answers(tmp_path: Path) -> None:
    server = started(tmp_path, "import time; time.sleep(30)", 0.5)
    with refused("rollout.timeout", error=RunFailed):
        server.wait()
    assert server._process is None


def test_it_ends_with_a_killed_trainer(tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "from perl.rollout.vllm.serve import _WITH_ITS_PARENT\n"
            "subprocess.Popen([sys.executable, '-c', _WITH_ITS_PARENT, *sys.argv[1:]], start_new_session=True)\n"
            "time.sleep(60)",
            *(
                sys.executable,
                "-c",
                ANSWERS.replace("time.sleep(60)", "pass"),
                "0",
                str(tmp_path / "pids"),
            ),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for _ in range(200):
        if (tmp_path / "pids").exists() and (tmp_path / "pids").read_text():
            break
        time.sleep(0.1)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert gone(int((tmp_path / "pids").read_text().split()[0]))


@pytest.fixture
def server(folder: Path) -> Iterator[VLLMServer]:
    with vllm_server(folder) as made:
        yield made


def test_doctor_looks_at_a_server(server: VLLMServer, capsys: pytest.CaptureFixture[str]) -> None:
    run("doctor", "--url", server.url)
    said = capsys.readouterr().out
    tells(said, server.url, "vLLM 0.32.0", "4096 tokens", "weights default")
    assert "lacks" not in said
    assert run("doctor", "--url", "http://127.0.0.1:9") == 1
    server.before = lambda path, body: (
        (200, {"paths": {"/pause": {}}}) if "openapi" in path else None
    )
    assert run("doctor", "--url", server.url) == 1
    tells(capsys.readouterr().out, "--enable-scale-out", "VLLM_SERVER_DEV_MODE=1")


def test_raw_log_probs_are_told(server: VLLMServer, capsys: pytest.CaptureFixture[str]) -> None:
    """They are the same at every temperature."""
    content = [{"token_id": 1, "logprob": -1.0, "top_logprobs": []}]
    choice = {"index": 0, "logprobs": {"content": content}}
    server.before = lambda path, body: (
        (200, {"choices": [choice]}) if path.endswith("generate") else None
    )
    assert run("doctor", "--url", server.url) == 1
    tells(capsys.readouterr().out, "--logprobs-mode processed_logprobs")


def test_serve_prints_its_command(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model.path", folder, "--rollout.vllm", sys.executable)
    run("serve", "default", *given, "--print", "--port", "8222")
    said = capsys.readouterr().out
    tells(said, f"serve {folder}", "--port 8222", "VLLM_SERVER_DEV_MODE=1")
    assert run("serve", "demo") == 2
    tells(capsys.readouterr().err, "model.path", "--model.path")
