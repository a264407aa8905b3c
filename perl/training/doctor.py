"""What this machine has: versions, device, backend, attention, and the command that installs what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from perl.failures import install_command
from perl.types import UserError

_PACKAGES = {
    "train": "transformers accelerate datasets huggingface-hub tokenizers peft safetensors scikit-learn scipy "
    "tensorboard matplotlib jinja2 openai tomli-w",
    "rewards": "math-verify",
    "video": "av",
    "flash": "flash-attn",
    "liger": "liger-kernel",
    "bench": "pytest-benchmark",
}
"""By the extra that installs them."""


def examine(urls: Sequence[str] = ()) -> bool:
    """Print the findings; False if `perl-rl train` could not run, or one of these vLLM servers lacks something."""
    import platform

    import torch

    from perl.model.layers import choose_layers
    from perl.model.loading import compute_dtype
    from perl.model.packed.attention import choose
    from perl_kernels.dispatch import available_backends

    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"python       {platform.python_version()} on {system}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    cuda = torch.cuda.is_available()
    here = torch.device("cuda" if cuda else "cpu")
    dtype = compute_dtype("auto", here)
    device = "CPU (no CUDA device)"
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    print(f"device       {device}")
    masters = ", trained with float32 masters" if dtype == torch.bfloat16 else ""
    print(f"precision    {str(dtype).removeprefix('torch.')}{masters}")
    for name, (available, reason) in available_backends().items():
        print(f"kernels      {name:<8} {'yes' if available else 'no ':<4} {reason}")
    attention, reason = choose("auto", here, dtype == torch.bfloat16)
    print(f"attention    {attention} ({reason})")
    *_, layers = choose_layers("auto", "auto", here)
    print(f"layers       {layers}")
    print(f"endpoint     {_endpoint()}")
    print(f"vllm         {_executable()}")
    # Each is looked at, also behind one that lacks something.
    complete = all(list(map(_server, urls)))
    print(f"disk         {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    for extra, packages in _PACKAGES.items():
        for package in packages.split():
            try:
                print(f"{package:<12} {version(package)}")
            except PackageNotFoundError:
                needed = " (needed to train)" if extra == "train" else ""
                complete &= not needed
                print(f"{package:<12} missing{needed}: {install_command(extra)}")
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision  missing, not needed: images go through transformers' PIL processors")
    return complete


def _endpoint() -> str:
    """What is set for a model that judges or labels; it is not asked."""
    from perl.llm import Endpoint

    if not (os.environ.get("PERL_LLM_URL") or os.environ.get("OPENAI_BASE_URL")):
        return "none (PERL_LLM_URL and PERL_LLM_MODEL name one for labels, judges and extraction)"
    try:
        found = Endpoint.from_env()
    except UserError as error:
        return f"cannot be used: {error}"
    return (
        f"{found.shown}, {found.model}, {'with' if found.api_key else 'without'} a key (not asked)"
    )


def _executable() -> str:
    found = shutil.which("vllm")
    return found or "none on PATH (rollout.vllm names one of another environment; docs/rollouts.md)"


def _server(url: str) -> bool:
    """Print what a vLLM server is and lacks; whether it can be sampled on."""
    from perl.rollout.vllm.client import KEY, Loop, Server, ServerError
    from perl.rollout.vllm.examine import examine

    try:
        found = Loop().run(examine(Server(url, os.environ.get(KEY), 30.0, 1)))
    except ServerError as error:
        print(f"server       {error}; start one with perl-rl serve")
        return False
    lacks = "".join(f"; lacks {flag}" for flag in found.lacks)
    print(f"server       {url}: {', '.join(found.said)}{lacks}")
    return not found.lacks
