"""A minimal web handler: POST a JSON object with a prompt, get a PNG.

    python examples/web.py sample --port 8000
    curl -d '{"prompt": "a red circle", "seed": 7}' -o circle.png http://127.0.0.1:8000/

Options of a request have their names in Python. All threads share one pipeline, and at most two generate at once.
"""

from __future__ import annotations

import argparse
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
ROOM = threading.BoundedSemaphore(2)


class Handler(BaseHTTPRequestHandler):
    """Answers a POST with an image, or with a JSON object that has an `error`."""

    pipeline: Pipeline
    timeout = 10  # seconds to wait for a client

    def do_POST(self) -> None:
        """Generate one image."""
        try:
            options = self.read_options()
            with ROOM:
                result = self.pipeline(**options)
        except (RequestError, ValueError) as error:
            self.answer(400, "application/json", json.dumps({"error": str(error)}).encode())
        except LatentRTError as error:
            self.answer(500, "application/json", json.dumps({"error": str(error)}).encode())
        else:
            png = io.BytesIO()
            result.save(png)
            self.answer(200, "image/png", png.getvalue())

    def read_options(self) -> dict[str, Any]:
        """Return the options in the body; raise ValueError for any that this service does not take."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # the body stays unread
            raise ValueError(f"got Content-Length {length!r}, expected at most {MAX_BODY_BYTES}")
        options = json.loads(self.rfile.read(int(length)))
        if not isinstance(options, dict) or not options.keys() <= OPTIONS or not isinstance(options.get("prompt"), str):
            raise ValueError(
                f"expected a JSON object with a prompt and no other keys than {', '.join(sorted(OPTIONS))}"
            )
        limits = {"num_inference_steps": MAX_STEPS, "height": MAX_SIDE, "width": MAX_SIDE}
        for name, limit in limits.items():
            if isinstance(options.get(name), int) and options[name] > limit:
                raise ValueError(f"{name}: got {options[name]}, this service's limit is {limit}")
        return options

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        """Send a response."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
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
    with make_server(Pipeline.load(arguments.bundle), arguments.port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/")
        server.serve_forever()
