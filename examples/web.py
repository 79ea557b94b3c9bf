"""A minimal web handler: POST a JSON object with a prompt, get a PNG.

    python examples/web.py sample --port 8000
    curl -d '{"prompt": "a red circle", "seed": 7}' -o circle.png http://127.0.0.1:8000/

It prints its address when it is ready, and Ctrl-C ends it. Options of a request have their names in Python. All
threads share one pipeline, and at most two generate at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from latentrt import LatentRTError, Pipeline, RequestError

MAX_BODY_BYTES = 16_384
# Options that a client may set; a path on this machine (`image`) is none of them.
OPTIONS = {"prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "height", "width"}
MAX_STEPS, MAX_SIDE = 50, 768
EXAMPLE = '{"prompt": "a red circle"}'
ROOM = threading.BoundedSemaphore(2)


class Handler(BaseHTTPRequestHandler):
    """Answers a POST of / with an image, and everything else with a JSON object that has an `error`."""

    pipeline: Pipeline
    timeout = 10  # seconds to wait for a client

    def do_POST(self) -> None:
        """Generate one image."""
        if self.path != "/":
            self.answer_error(404, f"got the path {self.path}, expected /")
            return
        try:
            options = self.read_options()
            with ROOM:
                result = self.pipeline(**options)
        except (RequestError, ValueError) as error:
            self.answer_error(400, str(error))
        except LatentRTError as error:
            self.answer_error(500, str(error))
        else:
            png = io.BytesIO()
            result.save(png)
            self.answer(200, "image/png", png.getvalue())

    def refuse_method(self) -> None:
        """Say that only POST is served."""
        self.close_connection = True  # a body stays unread
        self.answer_error(405, f"got {self.command}, expected POST")

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = refuse_method  # noqa: N815  # the base class's names

    def read_options(self) -> dict[str, Any]:
        """Return the options in the body; raise ValueError for any that this service does not take."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # the body stays unread
            raise ValueError(f"got Content-Length {length!r}, expected at most {MAX_BODY_BYTES}")
        try:
            options = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body is not JSON: {error}; expected an object like {EXAMPLE}") from None
        if not isinstance(options, dict):
            raise ValueError(f"got JSON that is no object, expected one like {EXAMPLE}")
        if unknown := sorted(options.keys() - OPTIONS):
            raise ValueError(f"got the key {unknown[0]!r}, expected only {', '.join(sorted(OPTIONS))}")
        if not isinstance(options.get("prompt"), str):
            raise ValueError(f"prompt: got {json.dumps(options.get('prompt'))[:50]}, expected a text")
        limits = {"num_inference_steps": MAX_STEPS, "height": MAX_SIDE, "width": MAX_SIDE}
        for name, limit in limits.items():
            if isinstance(options.get(name), int) and options[name] > limit:
                raise ValueError(f"{name}: got {options[name]}, this service's limit is {limit}")
        return options

    def answer_error(self, status: int, message: str) -> None:
        """Send an error as JSON."""
        self.answer(status, "application/json", json.dumps({"error": message}).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error of the base class, such as a malformed request, as JSON in place of HTML."""
        self.close_connection = True
        self.answer_error(code, message or "the request is malformed")

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        """Send a response."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", "POST")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def make_server(pipeline: Pipeline, port: int) -> ThreadingHTTPServer:
    """Return a server on this machine's own address; port 0 takes a free one."""
    handler = type("PipelineHandler", (Handler,), {"pipeline": pipeline})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve images of a bundle over HTTP.")
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    server = make_server(Pipeline.load(arguments.bundle), arguments.port)
    with server, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        server.serve_forever()
