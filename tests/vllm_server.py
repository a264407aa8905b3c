"""A server in a thread that speaks the routes of vLLM that `perl.rollout.vllm` uses, and samples with the engine in process.

As in vLLM 0.32: pixels that were not sent and are in no cache are an error 500, what is cached is of the weights of its time until a
pause clears it, weights between start and finish answer nothing, and every choice says which weights sampled it.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from PIL import Image

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.types import EncodedImage, EncodedPrompt


class VLLMServer:
    """What it was asked stands in `asked`: the path and the body of each request, in their sequence.

    `before` is called with both before a request is answered: it may wait, or return a status and an answer of its own.
    Completions of several come `delay` seconds later than they could, under the weights and with the pictures that were there.
    """

    def __init__(self, folder: Path) -> None:
        self.config = ModelConfig(path=str(folder))
        self.policy = load_policy(str(folder), self.config, torch.device("cpu"))
        self.processor = load_processor(str(folder), self.config)
        self.version, self.loading, self.paused = "default", False, False
        # With the weights that they were first seen under, as their features are kept.
        self.pictures: dict[str, tuple[EncodedImage, Policy]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.before: Callable[[str, Any], tuple[int, Any] | None] = lambda path, body: None
        self.url, self.delay = "", 0.0
        self._lock = threading.Lock()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def answer(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        self.asked.append((path, body))
        if (own := self.before(path, body)) is not None:
            return own
        name = path.rpartition("/")[2]
        if name == "generate":
            return self._generate(body)
        with self._lock:
            if name == "models":
                model = {"id": "perl", "root": self.config.path, "max_model_len": 4096}
                return 200, {"data": [model]}
            if name == "version":
                return 200, {"version": "0.32.0"}
            if name == "openapi.json":
                routes = ("/inference/v1/generate", "/start_weight_update", "/pause")
                return 200, {"paths": {route: {} for route in routes}}
            if name == "weight_info":
                return 200, {"weight_version": self.version}
            if name == "pause":
                self.paused = True
                if query.get("clear_cache", "true") == "true":
                    self.pictures.clear()
            elif name == "resume":
                self.paused = False
            elif name == "start_weight_update":
                self.loading = True
            elif name == "update_weights":
                folder = body["update_info"]["path"]
                self.policy = load_policy(folder, self.config, torch.device("cpu"))
            elif name == "finish_weight_update":
                self.loading, self.version = False, body["weight_version"]
            elif name not in ("init_weight_transfer_engine", "health"):
                return 404, {"error": f"no route {path}"}
        return 200, {}

    def _generate(self, body: Any) -> tuple[int, Any]:
        sampling, ids = body["sampling_params"], np.array(body["token_ids"])
        token = self.processor.image_token_id
        with self._lock:
            if self.loading:
                return 500, {"error": "expected device meta"}
            for part in body.get("content_parts", ()):
                data = part["url"].partition(",")[2]
                image = self.processor.encode_image(Image.open(io.BytesIO(base64.b64decode(data))))
                self.pictures.setdefault(part["uuid"], (image, self.policy))
                place = {"offset": 0, "length": image.tokens}
                return 200, {"choices": [], "mm_placeholders": {"image": [place]}}
            images: list[EncodedImage] = []
            policy, version = self.policy, self.version
            if said := body.get("features"):
                keys = said["mm_hashes"]["image"]
                if missing := [key for key in keys if key not in self.pictures]:
                    return 500, {"error": f"no data for {missing}"}
                images = [self.pictures[key][0] for key in keys]
                policy = self.pictures[keys[0]][1]
        positions, following = self.processor.family.positions(ids, images, token)
        prompt = EncodedPrompt(ids, positions, following, tuple(images), token)
        params = SamplingParams(
            sampling.get("n", 1),
            sampling.get("temperature", 1.0),
            sampling["max_tokens"],
            sampling.get("top_p", 1.0),
            # Where the likeliest token is asked for too, it is the one that is drawn.
            1 if sampling.get("logprobs") else sampling.get("top_k", 0),
            tuple(sampling.get("stop", ())),
        )
        if params.n > 1:
            time.sleep(self.delay)
        with self._lock:
            engine = InProcessEngine(policy, self.processor, 4096)
            found = engine.generate([prompt], params, seed=len(self.asked))[0]
        return 200, {"choices": [self._choice(*each, version) for each in enumerate(found)]}

    def _choice(self, index: int, completion: Completion, version: str) -> Any:
        ids, logprobs = completion.token_ids.tolist(), completion.logprobs.tolist()
        content = [
            {"token_id": i, "logprob": p, "rank": 1, "top_logprobs": []}
            for i, p in zip(ids, logprobs, strict=True)
        ]
        return {
            "index": index,
            "finish_reason": "stop" if completion.finished else "length",
            "token_ids": ids,
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
            "logprobs": {"content": content},
        }


@contextmanager
def vllm_server(folder: Path) -> Iterator[VLLMServer]:
    """A server of the model in the folder, on a port of its own."""
    made = VLLMServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            status, answer = made.answer(
                parts.path, dict(parse_qsl(parts.query)), json.loads(content or "{}")
            )
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # A client that has given up is no news.
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
