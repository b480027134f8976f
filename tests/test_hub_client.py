"""The real hub client against a local server that speaks the hub's protocol."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

GOLDEN = Path(__file__).parent / "golden"
FILES = ("coarse.pth", "c2f.pth", "codec.pth")
PROGRAM = """
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # what is kept of a broken download: whole chunks of 10 MB
from vampnet_jax.cli import main
main()
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the golden checkpoints; the first request for c2f.pth breaks off in the middle."""

    protocol_version = "HTTP/1.1"
    ranges: ClassVar[list[str]] = []
    broken: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/hugggof/vampnet"):
            body = json.dumps(description()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            self.respond(with_body=True)

    def respond(self, with_body: bool) -> None:
        match = re.fullmatch(rf"/hugggof/vampnet/resolve/{COMMIT}/(\S+\.pth)", self.path)
        if match is None or match[1] not in FILES:
            self.send_error(404)
            return
        data = (GOLDEN / match[1]).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start:
            self.ranges.append(match[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if with_body and match[1] == "c2f.pth" and not self.broken:
            self.broken.append(match[1])
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(data[start:])

    def log_message(self, *args: object) -> None:
        """Stay quiet."""


def description() -> dict:
    siblings = []
    for name in FILES:
        data = (GOLDEN / name).read_bytes()
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        siblings.append({"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs})
    return {"id": "hugggof/vampnet", "sha": COMMIT, "siblings": siblings, "tags": []}


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_download_that_broke_off_is_continued(endpoint, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LOCALAPPDATA": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "TQDM_POSITION": "-1",  # progress bars although this is no terminal
    }
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-c", PROGRAM, "download"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Handler.broken == ["c2f.pth"]
    assert "c2f.pth" in Handler.ranges  # the second half alone was asked for
    assert "codec.pth" in result.stderr  # the client's progress bars
    assert COMMIT in next((tmp_path / "cache").rglob("MODEL_CARD.md")).read_text()
