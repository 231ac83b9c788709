"""Names that stand for files, and reading parts of remote ones over HTTP."""

import http.server
import threading

import pytest

from latentvae.data import open_captions, open_source
from latentvae.data.storage import expand, file_name, suffix
from latentvae.errors import UserError
from latentvae.images import ImageError
from tests.data.archives import png, write_parquet, write_tar


@pytest.mark.parametrize(
    ("name", "extension", "base"),
    [
        ("a/b.TAR", ".tar", "b.TAR"),
        ("a.tar.gz", ".tar.gz", "a.tar.gz"),
        ("https://host/x/y.tar?token=a.b/c", ".tar", "y.tar"),
        ("s3://bucket/folder/", "", "folder"),
        ("a.b/c", "", "c"),
        ("v1.2.parquet", ".parquet", "v1.2.parquet"),
    ],
)
def test_extensions_and_names(name, extension, base):
    assert suffix(name) == extension and file_name(name) == base


def test_braces_globs_and_several_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "odd{1..2}.tar", "c[1].tar"):
        (tmp_path / name).touch()
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{b,a-08}.tar") == ["b.tar", "a-08.tar"]
    assert expand("a-*.tar::b.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "b.tar"]
    assert expand("a-{0,1}*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("odd{1..2}.tar") == ["odd{1..2}.tar"] and expand("c[1].tar") == ["c[1].tar"]  # there as written
    assert expand("https://host/{a,b}-{1..2}.tar?x=1") == [
        f"https://host/{letter}-{number}.tar?x=1" for letter in "ab" for number in (1, 2)
    ]
    for name in ("a-{07..08}.tar", "z*.tar", "{0..99999999}.tar"):
        with pytest.raises(UserError):
            expand(name)


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that gives parts of files, as all that matter do; Python's own gives only whole ones."""

    ranges = True
    served: list[tuple[str, str | None]]

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.served.append((self.path, wanted))
        if not self.ranges or wanted is None:
            return super().do_GET()
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """(URL of tmp_path, its handler class)."""
    pytest.importorskip("aiohttp")
    kind = type("OneHandler", (Handler,), {"served": [], "ranges": True})
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: kind(*given, directory=str(tmp_path)))
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_address[1]}", kind
    web.shutdown()
    thread.join()
    web.server_close()


def test_tar_and_parquet_over_http(tmp_path, server):
    url, handler = server
    images = {f"{index}.png": png(index) for index in range(4)}
    write_tar(tmp_path / "s-0.tar", {**images, "0.txt": b"zero"})
    write_tar(tmp_path / "s-1.tar", {"big.png": png(9) + bytes(20_000_000), "last.png": png(10)})
    source = open_source(f"{url}/s-{{0..1}}.tar")
    assert source.entries().keys == [*(f"s-0.tar/{name}" for name in images), "s-1.tar/big.png", "s-1.tar/last.png"]
    ranges = [wanted for path, wanted in handler.served if path == "/s-1.tar" and wanted is not None]
    asked = sum(int(last) - int(first) + 1 for first, last in (wanted[6:].split("-") for wanted in ranges))
    assert 0 < asked < 15_000_000  # the big member was jumped over
    handler.served.clear()
    assert source.fetch(source.entries()[:4]) == list(images.values())
    assert len(handler.served) == 1 and handler.served[0][1] is not None
    assert source.fetch(source.entries()[5:]) == [png(10)]
    assert open_captions(source).get(["s-0.tar/0.png"]) == [{"caption": "zero"}]
    write_parquet(tmp_path / "p.parquet", image=list(images.values()), key=list(images))
    rows = open_source(f"{url}/p.parquet")
    assert rows.entries().keys == list(images) and rows.fetch(rows.entries()) == list(images.values())
    with pytest.raises(UserError, match=r"absent\.tar cannot be read"):
        open_source(f"{url}/absent.tar").entries()
    (tmp_path / "l.txt").write_text(f"{url}/a.png\n{url}/absent.png\n")
    (tmp_path / "a.png").write_bytes(png(3))
    listed = open_source(tmp_path / "l.txt")
    content, absent = listed.fetch(listed.entries())
    assert content == png(3) and isinstance(absent, FileNotFoundError)


def test_a_server_that_knows_no_parts_is_told(tmp_path, server):
    url, handler = server
    write_tar(tmp_path / "s.tar", {"a.png": png(1), "b.png": png(2)})
    source = open_source(f"{url}/s.tar")
    entries = source.entries()
    handler.ranges = False
    with pytest.raises(ImageError, match="only as a whole"):
        source.read(1)
    assert isinstance(source.fetch(entries[1:])[0], OSError)
    with pytest.raises(UserError):
        open_source(f"{url}/s.tar").entries()
