"""The web handler: images as PNG, errors as JSON, a bounded body, one pipeline for all threads."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

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


def post(address: str, body: bytes | None, method: str = "POST") -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, method=method), timeout=60) as answer:
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
        (b"no json", "the body is not JSON"),
        (b"[" * 9000, "the body is not JSON"),
        (b"[]", "no object"),
        (b'{"seed": 1}', "prompt: got null, expected a text"),
        (b'{"prompt": 5}', "prompt: got 5, expected a text"),
        (b'{"prompt": "a", "image": "/etc/passwd"}', "got the key 'image'"),
        (b'{"prompt": "a", "width": 63}', "multiple of 4"),
        (b'{"prompt": "a", "num_inference_steps": 51}', "limit is 50"),
        (b" " * (web.MAX_BODY_BYTES + 1), "at most 16384"),
    ],
)
def test_a_bad_request_is_answered_with_the_reason(address: str, body: bytes, fragment: str) -> None:
    status, text = post(address, body)
    assert status == 400
    assert fragment in json.loads(text)["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "fragment"),
    [
        ("GET", "", 405, "got GET, expected POST"),
        ("PUT", "", 405, "got PUT, expected POST"),
        ("BREW", "", 501, "BREW"),
        ("POST", "foo/bar", 404, "got the path /foo/bar"),
    ],
)
def test_another_method_or_path_is_an_error_in_json(
    address: str, method: str, path: str, status: int, fragment: str
) -> None:
    found, text = post(address + path, b"" if method == "PUT" else None, method)
    assert found == status
    assert fragment in json.loads(text)["error"]


def test_a_request_without_http_is_an_error_in_json(address: str) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0), timeout=60) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b'"error": ' in connection.makefile("rb").read()


def test_ctrl_c_ends_the_program_without_a_traceback() -> None:
    command = [sys.executable, web.__file__, "sample", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http://127.0.0.1:")
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=60) == ("", "")
    assert server.returncode == 0
