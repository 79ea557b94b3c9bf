"""The web handler: images as PNG, errors as JSON, a bounded body, one pipeline for all threads."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from examples import web
from latentrt import Pipeline


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with web.make_server(Pipeline.load(), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.Handler, "log_message", lambda *arguments: None)


def post(address: str, body: bytes) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_threads_share_the_pipeline_and_each_gets_its_own_image(address: str) -> None:
    def generate(seed: int) -> bytes:
        body = {"prompt": "a red circle", "seed": seed, "num_inference_steps": 4}
        status, png = post(address, json.dumps(body).encode())
        assert status == 200
        return png

    with ThreadPoolExecutor(3) as pool:
        first, second, again = pool.map(generate, (1, 2, 1))
    assert first == again != second
    assert Image.open(io.BytesIO(first)).size == (64, 64)


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b"no json", "Expecting value"),
        (b"[]", "a JSON object"),
        (b'{"seed": 1}', "a prompt"),
        (b'{"prompt": "a", "image": "/etc/passwd"}', "no other keys"),
        (b'{"prompt": "a", "width": 63}', "multiple of 4"),
        (b'{"prompt": "a", "num_inference_steps": 51}', "limit is 50"),
        (b" " * (web.MAX_BODY_BYTES + 1), "at most 16384"),
    ],
)
def test_a_bad_request_is_answered_with_the_reason(address: str, body: bytes, fragment: str) -> None:
    status, text = post(address, body)
    assert status == 400
    assert fragment in json.loads(text)["error"]
