"""A chat endpoint in a thread, which answers as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


def says(text: str | None, end: str = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": end}
    return 200, {"choices": [choice]}


@dataclass
class Model:
    """The endpoint of the fixture `model`: `answer` of a chat's first message, which a test sets, and the
    last messages that it was `asked`."""

    answer: Callable[[str], str | Reply] = lambda task: "yes"
    asked: list[str] = field(default_factory=list)

    def reply(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        self.asked.append(body["messages"][-1]["content"])
        answer = self.answer(body["messages"][0]["content"])
        return says(answer) if isinstance(answer, str) else answer


@contextmanager
def serving(reply: Callable[[dict[str, Any], dict[str, str]], Reply]) -> Iterator[str]:
    """The base address of a server that answers with `reply(body, headers)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            headers = {name.title(): value for name, value in self.headers.items()}
            status, answer, *more = reply({**body, "path": self.path}, headers)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in (more[0] if more else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # A client that has given up is no news.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
