"""What this machine has: versions, device, backend, attention, and the command that installs what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version

from perl.types import UserError

_PARTS = (
    (
        "train",
        (
            "transformers",
            "accelerate",
            "datasets",
            "peft",
            "tensorboard",
            "matplotlib",
            "jinja2",
            "safetensors",
        ),
    ),
    ("train", ("scikit-learn", "tomli-w")),
    ("rewards", ("math-verify",)),
    ("flash", ("flash-attn",)),
    ("liger", ("liger-kernel",)),
    ("bench", ("pytest-benchmark",)),
)


def examine() -> bool:
    """Print the findings; False if `perl-rl train` could not run."""
    import platform

    import torch

    from perl.model.head import available_backends
    from perl.model.packed.attention import choose

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        print(
            f"device       {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
        )
        print(
            f"precision    {'bfloat16 autocast' if torch.cuda.is_bf16_supported() else 'float32'}"
        )
    else:
        print("device       CPU (no CUDA device)")
        print("precision    float32")
    for name, (available, reason) in available_backends().items():
        print(f"kernels      {name:<8} {'yes' if available else 'no ':<4} {reason}")
    attention, reason = choose("auto", device, cuda and torch.cuda.is_bf16_supported())
    print(f"attention    {attention} ({reason})")
    print(f"endpoint     {_endpoint()}")
    print(f"disk         {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    complete = True
    for extra, packages in _PARTS:
        for package in packages:
            found = _version(package)
            if found:
                print(f"{package:<12} {found}")
                continue
            required = extra == "train"
            complete &= not required
            print(
                f"{package:<12} missing{' (needed to train)' if required else ''}: pip install '.[{extra}]' (in a clone)"
            )
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
