"""Downloads: what is there is not fetched again, what broke off goes on, and nothing is half there."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")

from nemo_llm.corpus import download
from nemo_llm.corpus.download import fetch_inputs, is_remote
from nemo_llm.errors import InputError

CONTENT = bytes(range(256)) * 4000


class Server(http.server.BaseHTTPRequestHandler):
    """A web server that can be asked for a range, and that breaks off when its ``budget`` of bytes is spent."""

    protocol_version = "HTTP/1.1"
    budget = 10**9
    served = 0
    ranges = True
    tag = '"one"'

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        if not self.path.startswith("/data/"):
            self.send_error(404)
            return
        first, last = 0, len(CONTENT) - 1
        asked = self.headers.get("Range") if self.ranges else None
        if asked:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(last, int(stop or last))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        else:
            self.send_response(200)
        body = CONTENT[first : last + 1]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.tag)
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        self.end_headers()
        if not head:
            room = max(0, type(self).budget - type(self).served)
            self.wfile.write(body[:room])
            type(self).served += len(body[:room])
            if room < len(body):
                self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.budget, Server.served, Server.ranges, Server.tag = 10**9, 0, True, '"one"'
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/data"
    running.shutdown()
    running.server_close()


def fetch(address: str, folder: Path, max_files: int | None = None) -> list[str]:
    return fetch_inputs([address], folder, max_files, lambda *_: None)


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(download, "_ATTEMPTS", 2)


def test_a_download_goes_on_where_it_broke_off(server: str, tmp_path: Path) -> None:
    Server.budget = 400_000
    with pytest.raises(InputError, match="broke off 2 times"):
        fetch(f"{server}/a.bin", tmp_path)
    (part,) = tmp_path.rglob("*.part")
    there = part.stat().st_size
    assert 0 < there < len(CONTENT)
    assert CONTENT.startswith(part.read_bytes())
    Server.budget, Server.served = 10**9, 0
    (place,) = fetch(f"{server}/a.bin", tmp_path)
    assert Path(place).read_bytes() == CONTENT
    assert Server.served == len(CONTENT) - there
    assert not list(tmp_path.rglob("*.part"))
    changed = Path(place).stat().st_mtime_ns
    assert fetch(f"{server}/a.bin", tmp_path) == [place]
    assert Path(place).stat().st_mtime_ns == changed
    assert Server.served == len(CONTENT) - there


def test_a_changed_source_is_fetched_anew(server: str, tmp_path: Path) -> None:
    Server.budget = 300_000
    with pytest.raises(InputError, match="broke off"):
        fetch(f"{server}/a.bin", tmp_path)
    Server.budget, Server.served, Server.tag = 10**9, 0, '"two"'
    (place,) = fetch(f"{server}/a.bin", tmp_path)
    assert Path(place).read_bytes() == CONTENT
    assert Server.served == len(CONTENT)


def test_a_server_without_ranges_gives_whole_files(server: str, tmp_path: Path) -> None:
    Server.ranges = False
    (place,) = fetch(f"{server}/a.bin", tmp_path)
    assert Path(place).read_bytes() == CONTENT


def test_patterns_limits_and_what_is_not_there(server: str, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"text": str(number)}) + "\n")
    address = f"file://{tmp_path}/part-*.jsonl"
    assert is_remote(address)
    assert not is_remote(str(tmp_path / "part-*.jsonl"))
    places = fetch(address, tmp_path / "here", max_files=3)
    assert [Path(place).name for place in places] == [f"part-{number}.jsonl" for number in range(3)]
    assert Path(places[2]).read_text() == '{"text": "2"}\n'
    assert fetch_inputs(["a.jsonl", address], tmp_path / "here", 1, lambda *_: None) == ["a.jsonl", places[0]]
    with pytest.raises(InputError, match="names no file"):
        fetch(f"file://{tmp_path}/nothing-*.jsonl", tmp_path / "here")
    with pytest.raises(InputError, match="cannot be listed"):
        fetch(f"{server.removesuffix('/data')}/nothing.jsonl", tmp_path / "here")
    with pytest.raises(InputError, match="Protocol not known: nosuch"):
        fetch("nosuch://bucket/*.parquet", tmp_path / "here")
