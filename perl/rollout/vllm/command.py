"""`perl-rl serve`: a vLLM server for a run that is started elsewhere."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from perl.config import Command, Config, Count
from perl.recipe import DEFAULT_RECIPE
from perl.types import UserError


@dataclass(frozen=True)
class Serve(Command):
    """Start the vLLM server that a run by this recipe samples on, in the foreground, as in
    `perl-rl serve recipe.toml --rollout.vllm ~/vllm/bin/vllm`; then, elsewhere, `perl-rl train recipe.toml
    --rollout.engine vllm --rollout.url http://127.0.0.1:8000`. A run that is given no address starts one by itself."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    port: Count = 8000
    """That it listens at; 0: one that is free."""
    host: str = "127.0.0.1"
    """Address that it listens at; beyond this machine it needs PERL_VLLM_API_KEY in its environment and in the run's."""
    print: bool = False
    """Only print the shell command, for another machine or a container."""

    def execute(self) -> None:
        import torch

        from perl.model.loading import check_model, compute_dtype
        from perl.model.tiny import TINY_MODELS
        from perl.rollout.engines import transfer_of
        from perl.rollout.vllm.client import KEY
        from perl.rollout.vllm.serve import launch

        config, cuda = self.config, torch.cuda.is_available()
        if not config.model.path or config.model.path in TINY_MODELS:
            raise UserError(
                f"model.path = {config.model.path or '(none)'}: perl-rl serve needs a model folder or hub name, as in "
                "--model.path Qwen/Qwen2.5-VL-3B-Instruct; a run makes its tiny model itself, and serves it without --rollout.url"
            )
        check_model(config.model.path)
        dtype = compute_dtype(config.model.dtype, torch.device("cuda" if cuda else "cpu"))
        way = transfer_of(config.rollout, cuda)
        made = launch(
            config,
            config.model.path,
            str(dtype).removeprefix("torch."),
            way,
            cuda,
            self.port,
            self.host,
        )
        if self.print:
            sys.stdout.write(made.in_shell() + "\n")
            return
        print(
            f"serving {config.model.path} at {made.url}; give runs --rollout.url {made.url}",
            file=sys.stderr,
        )
        key = os.environ.get(KEY)
        environment = {**os.environ, **made.environment} | ({"VLLM_API_KEY": key} if key else {})
        os.execve(made.command[0], [*made.command], environment)
