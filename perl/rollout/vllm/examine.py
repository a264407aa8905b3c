"""What a running vLLM server has of that which rollouts need, and the flags that bring what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, field

from perl.rollout.vllm.client import MODEL, Server
from perl.rollout.vllm.serve import TESTED

_ROUTES = {
    "/inference/v1/generate": "--enable-scale-out",
    "/start_weight_update": "VLLM_SERVER_DEV_MODE=1 in its environment",
    "/pause": "VLLM_SERVER_DEV_MODE=1 in its environment",
}


@dataclass
class Findings:
    """`lacks` has what to start the server with in place of what it has; `said` is what it is."""

    said: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    tested: bool = True


async def examine(server: Server) -> Findings:
    """Ask a server what it is; nothing of it changes.

    Raises:
        ServerError: it does not answer.
    """
    found = Findings()
    version = str((await server.get("/version"))["version"])
    found.tested = version.startswith(TESTED)
    found.said.append(f"vLLM {version}" + ("" if found.tested else f" (tested: {TESTED})"))
    routes = (await server.get("/openapi.json"))["paths"]
    found.lacks += dict.fromkeys(flag for path, flag in _ROUTES.items() if path not in routes)
    served = {model["id"]: model for model in (await server.get("/v1/models"))["data"]}
    if MODEL not in served:
        found.lacks.append(f"--served-model-name {MODEL}")
        return found
    own = served[MODEL]
    found.said.append(f"{own['root']}, {own['max_model_len']} tokens")
    if "--enable-scale-out" not in found.lacks:
        likeliest = [await _likeliest(server, temperature) for temperature in (1.0, 0.25)]
        # The sharper distribution gives its likeliest token more; logits as they are know no temperature.
        if likeliest[1] <= likeliest[0] + 1e-6:
            found.lacks.append("--logprobs-mode processed_logprobs")
    if not any("DEV_MODE" in flag for flag in found.lacks):
        found.said.append(f"weights {await server.weight_version()}")
    return found


async def _likeliest(server: Server, temperature: float) -> float:
    """Log-prob of the likeliest token behind some token."""
    # The drawn token comes first among as many.
    sampling = {"max_tokens": 1, "temperature": temperature, "logprobs": 2}
    body = {"model": MODEL, "token_ids": [1], "sampling_params": sampling}
    (choice,) = await server.generate(body)
    (token,) = choice["logprobs"]["content"]
    return max(each["logprob"] for each in (token, *token["top_logprobs"]))
