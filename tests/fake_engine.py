"""A serving engine on loopback for tests: OpenAI's completions API over a model of ours, and what can go wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from runtime.config import EngineConfig
from runtime.model.loader import load_model


def answer(model: Any, prompt: list[int], top: int, form: str) -> dict[str, Any]:
    """Return what a server says of a prompt: `prompt_logprobs`, or `echo` with ids, or `text` for echo without."""
    log_p = model.logits(model(torch.tensor([prompt]))[0]).log_softmax(-1)
    places: list[dict[int, float] | None] = [None]
    for row, token in zip(log_p[:-1], prompt[1:], strict=True):
        best = row.topk(top)
        told = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        places.append({token: row[token].item(), **told})
    choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
    if form == "prompt_logprobs":
        told_places = [
            place
            and {str(token): {"logprob": value, "rank": 1, "decoded_token": "?"} for token, value in place.items()}
            for place in places
        ]
        choice |= {"prompt_logprobs": told_places, "prompt_token_ids": prompt}
    elif form != "none":
        # behind the prompt comes the one token that was generated
        ids = [*prompt, 7]
        own = [None, *(place[token] for place, token in zip(places[1:], prompt[1:], strict=True)), -1.0]
        told = [
            place and {f"token_id:{token}": value for token, value in place.items()} for place in (*places, {7: -1.0})
        ]
        named = [f"token_id:{token}" if form == "echo" else f"<{token}>" for token in ids]
        if form == "text":
            told = [place and {"?": -1.0} for place in told]
        choice["logprobs"] = {"tokens": named, "token_logprobs": own, "top_logprobs": told, "text_offset": []}
    return {"id": "1", "object": "text_completion", "model": "served", "choices": [choice]}


@dataclass
class FakeEngine:
    """What it serves and how; `requests` are the bodies it met."""

    url: str
    form: str = "prompt_logprobs"
    models: list[str] = field(default_factory=lambda: ["served"])
    status: int = 200
    raw: bytes | None = None
    edit: Callable[[dict[str, Any]], None] | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    hang: threading.Event | None = None
    headers: dict[str, str] = field(default_factory=dict)


@contextmanager
def serving(folder: Path) -> Iterator[FakeEngine]:
    """Serve a checkpoint in fp32 until the end of the block."""
    model = load_model(folder, EngineConfig(dtype="float32"), with_mtp=False).model
    engine = FakeEngine("")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.send({"data": [{"id": name} for name in engine.models]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engine.requests.append({**body, "path": self.path, "authorization": self.headers.get("Authorization")})
            if engine.hang is not None:
                engine.hang.wait(30)
            # a server that knows one way leaves out what it does not know
            form = engine.form if engine.form != "prompt_logprobs" or "prompt_logprobs" in body else "none"
            form = form if form == "prompt_logprobs" or body.get("echo") else "none"
            found = answer(model, body["prompt"], body.get("prompt_logprobs") or body.get("logprobs"), form)
            if engine.edit is not None:
                engine.edit(found)
            self.send(found)

        def send(self, value: dict[str, Any]) -> None:
            data = engine.raw if engine.raw is not None else json.dumps(value).encode()
            self.send_response(engine.status)
            for name, header in {**engine.headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, header)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    engine.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        if engine.hang is not None:
            engine.hang.set()
        server.shutdown()
        server.server_close()
        thread.join()
