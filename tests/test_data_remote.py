"""Shards behind URLs: a real HTTP server that misbehaves, stores as fsspec gives them, the cache on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_sr1.config import DataConfig
from megatron_sr1.data import (
    Quarantine,
    SampleFeed,
    ShardDataset,
    expand_shards,
    file_systems,
    open_stream,
    write_shards,
)
from megatron_sr1.data.file_systems import check_openable, download, file_of, read_all
from megatron_sr1.data.index import index_path
from megatron_sr1.data.remote import ShardCache
from megatron_sr1.data.remote_errors import RemoteError, foreign_errors, remote_error
from megatron_sr1.data.urls import beside, same_file, shard_name, shown
from megatron_sr1.types import Prompt
from tests.data_cases import equal, noise, prompts
from tests.test_data_index import indexed

BIG = 1 << 40  # bytes


@dataclass
class Server:
    """Serves a folder; `asked` has the paths of the requests, `cut` those whose bodies stop half-way."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    signature: str = ""  # that a URL must hold
    failing: dict[str, list[int]] = field(
        default_factory=dict
    )  # statuses of the next answers to a name; 0: it hangs up
    redirect: str = ""  # where every request is sent


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tries again at once; what is said of it is looked at where it matters."""
    monkeypatch.setattr(file_systems, "RETRY_SECONDS", (0.0, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    made = Server(tmp_path / "www")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].strip("/")
            made.asked.append(name)
            if made.redirect:
                self.send_response(302)
                self.send_header("Location", made.redirect)
                self.end_headers()
                return
            if made.failing.get(name) and self.command == "GET":
                status = made.failing[name].pop(0)
                if status:
                    self.send_error(status)
                return
            if not (made.folder / name).is_file():
                self.send_error(404)
                return
            if made.signature and made.signature not in self.path:
                self.send_error(403)
                return
            data = (made.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", hashlib.sha256(data).hexdigest())
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(ConnectionError):  # the reader had enough
                self.wfile.write(data[: len(data) // 2] if name in made.cut else data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    made.url = f"http://127.0.0.1:{httpd.server_port}"
    yield made
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def big_prompts(num: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "q", str(i), (noise(i, (150, 150)),)) for i in range(num)]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_stream_over_http(server: Server, tmp_path: Path, with_index: bool) -> None:
    """Also through the configuration, with braces, as one dataset and as a mixture."""
    samples = prompts(9)
    shards = write_shards(samples, server.folder, "t", 3)
    if with_index:
        indexed(shards)
    local = ShardDataset(shards)
    url = f"{server.url}/t-{{00000..00002}}.tar"
    assert expand_shards([url], "data.train") == [f"{server.url}/t-0000{i}.tar" for i in range(3)]
    config = DataConfig(train=(url,), cache_dir=str(tmp_path / "cache"))
    stream = open_stream(config, "train", 5, Quarantine(0), None)
    assert (
        stream.fingerprint
        == open_stream(DataConfig(train=(f"{server.folder}/t-*.tar",)), "train", 5, Quarantine(0), None).fingerprint
    ), "the same shards elsewhere are the same data"
    with SampleFeed(stream, Quarantine(0), workers=3) as feed:
        found = [sample for _ in range(3) for sample in feed.next(9).samples]
    assert all(equal(*pair) for pair in zip(found, stream.take(0, 27), strict=True))
    assert sorted(sample.answer for sample in found[:9]) == [str(i) for i in range(9)]
    assert all(equal(local.read(i), samples[i]) for i in range(9))

    parts = tuple(f"{server.url}/t-0000{i}.tar" for i in range(3))
    config = DataConfig(train=parts, train_weights=(2.0, 1.0, 1.0), cache_dir=str(tmp_path / "cache"))
    mixed = open_stream(config, "train", 5, Quarantine(0), None)
    keys = [mixed.key(i) for i in mixed.indices(0, 1000)]
    assert sum(key in {"p000", "p001", "p002"} for key in keys) == 500


def test_opening_reads_indices_and_downloads_nothing(server: Server, tmp_path: Path) -> None:
    indexed(write_shards(big_prompts(4), server.folder, "t", 2))
    cache = ShardCache(tmp_path / "cache", BIG)
    dataset = ShardDataset([f"{server.url}/t-0000{i}.tar" for i in range(2)], cache=cache)
    assert len(dataset) == 4 and dataset.image_sizes(3) == ((150, 150),)
    assert not (tmp_path / "cache").exists()
    server.asked.clear()
    for _ in range(3):
        assert [dataset.read(i).answer for i in range(4)] == ["0", "1", "2", "3"]
    assert sorted(server.asked) == ["t-00000.tar", "t-00001.tar"], "one download each"


def test_ranks_that_want_a_shard_at_once_download_it_once(server: Server, tmp_path: Path) -> None:
    write_shards(big_prompts(2), server.folder, "t", 2)
    caches = [ShardCache(tmp_path / "cache", BIG) for _ in range(6)]
    threads = [threading.Thread(target=cache.fetch, args=(f"{server.url}/t-00000.tar",)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == ["t-00000.tar"]
    copies = list((tmp_path / "cache").glob("*.tar"))
    assert [copy.read_bytes() for copy in copies] == [(server.folder / "t-00000.tar").read_bytes()]


def test_a_missing_shard_is_an_error_at_the_start(server: Server, tmp_path: Path) -> None:
    shards = indexed(write_shards(prompts(2), server.folder, "t", 1))
    shards[1].unlink()
    url = re.escape(f"{server.url}/t-00001.tar")
    with pytest.raises(ValueError, match=rf"^{url}: the shard cannot be opened \(HTTP 404 for {url}\)\. Correct"):
        ShardDataset([f"{server.url}/{s.name}" for s in shards], cache=ShardCache(tmp_path / "cache", BIG))
    shards[1].write_bytes(b"")
    with pytest.raises(ValueError, match=r"t-00001\.tar: the shard is empty"):
        ShardDataset([f"{server.url}/{s.name}" for s in shards], cache=ShardCache(tmp_path / "cache", BIG))
    with pytest.raises(ValueError, match=r"is a URL, and there is no cache"):
        ShardDataset([f"{server.url}/t-00000.tar"])


def test_a_download_that_stops_is_an_error_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    shard = indexed(write_shards(big_prompts(3), server.folder, "t", 3))[0]
    cache = ShardCache(tmp_path / "cache", BIG)
    dataset = ShardDataset([f"{server.url}/{shard.name}"], cache=cache)
    server.cut.add(shard.name)
    server.asked.clear()
    with pytest.raises(RemoteError, match=r"t-00000\.tar: ClientPayloadError"):
        dataset.read(0)
    assert server.asked == [shard.name] * 3, "it is tried again"
    assert not list((tmp_path / "cache").glob("*.tar"))
    server.cut.clear()
    assert dataset.read(0).answer == "0"


def test_another_shard_behind_the_url_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", BIG)
    for answer in ("1", "2"):
        shard = indexed(write_shards([Prompt("p", "q", answer)], server.folder, "t", 3))[0]
        assert ShardDataset([f"{server.url}/{shard.name}"], cache=cache).read(0).answer == answer


def test_an_old_copy_makes_room(server: Server, tmp_path: Path) -> None:
    """Room for two of three shards; the one not used longest goes, and comes again when it is wanted."""
    shards = write_shards(big_prompts(3), server.folder, "t", 1)
    urls = [f"{server.url}/{shard.name}" for shard in shards]
    cache = ShardCache(tmp_path / "cache", int(2.5 * shards[0].stat().st_size))
    copies = [cache.fetch(url) for url in urls[:2]]
    for age, copy in zip((100, 200), copies, strict=True):
        os.utime(copy, (copy.stat().st_atime, copy.stat().st_mtime - age))
    with copies[1].open("rb") as held:
        third = cache.fetch(urls[2])
        assert copies[0].exists() and third.exists() and not copies[1].exists()
        assert held.read() == shards[1].read_bytes(), "whoever has it open can go on"
    assert cache.fetch(urls[1]).read_bytes() == shards[1].read_bytes()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


class Bucket(MemoryFileSystem):
    """A store as fsspec gives them; `refuses` is raised by the next calls."""

    protocol = "bucket"
    store: dict = {}  # noqa: RUF012, as in its parent
    pseudo_dirs = [""]  # noqa: RUF012
    refuses: list[Exception] = []  # noqa: RUF012
    cut = False

    def info(self, path: str, **kwargs: object) -> dict:
        if self.refuses:
            raise self.refuses.pop(0)
        return super().info(path, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: object) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath)[: -1 if self.cut else None])


@pytest.fixture
def bucket() -> Iterator[type[Bucket]]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    yield Bucket
    Bucket.store.clear()
    Bucket.refuses, Bucket.cut = [], False


def put(url: str, path: Path) -> None:
    fsspec.filesystem("bucket").pipe_file(url, path.read_bytes())


def test_a_store_of_fsspec(bucket: type[Bucket], tmp_path: Path) -> None:
    """s3:// and gs:// are asked in the same way; their packages hold the same interface."""
    shard = indexed(write_shards(prompts(2), tmp_path, "t", 2))[0]
    url = "bucket://b/t-00000.tar"
    put(url, shard)
    put(f"{url}.index.json", index_path(shard))
    dataset = ShardDataset([url], cache=ShardCache(tmp_path / "cache", BIG))
    assert equal(dataset.read(1), prompts(2)[1])
    fsspec.filesystem("bucket").rm(f"{url}.index.json")
    assert len(ShardDataset([url], cache=ShardCache(tmp_path / "cache2", BIG))) == 2
    with pytest.raises(ValueError, match=r"bucket://b/absent\.tar: the shard cannot be opened \(.*: nothing is there"):
        ShardDataset(["bucket://b/absent.tar"], cache=ShardCache(tmp_path / "cache", BIG))
    bucket.refuses = [PermissionError("Forbidden")] * 9
    with pytest.raises(RemoteError, match="PermissionError: Forbidden"):
        download(url, tmp_path / "copy")
    assert len(bucket.refuses) == 8, "it would end the same way"
    bucket.refuses = [ConnectionResetError("by peer"), TimeoutError(), OSError("slow down")]
    with pytest.raises(RemoteError, match="slow down"):
        download(url, tmp_path / "copy")
    bucket.refuses = [ConnectionResetError("by peer"), TimeoutError()]
    download(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == shard.read_bytes()
    bucket.cut = True
    with pytest.raises(RemoteError, match=f"{shard.stat().st_size - 1} bytes came, of {shard.stat().st_size}"):
        ShardCache(tmp_path / "cache3", BIG).fetch(url)
    assert not list((tmp_path / "cache3").glob("*.tar"))
    bucket.refuses = [OSError(28, "No space left on device", str(tmp_path / "copy"))]
    with pytest.raises(OSError, match="No space left") as full:
        download(url, tmp_path / "copy")
    assert full.value.errno == 28, "told as it is: it is this machine's"


def test_a_command_of_the_users_own(tmp_path: Path) -> None:
    shard = write_shards(prompts(2), tmp_path, "t", 2)[0]
    url = f"pipe:cat {tmp_path}/$(basename x://t-00000.tar)"
    cache = ShardCache(tmp_path / "cache", BIG)
    assert cache.fetch(url).read_bytes() == shard.read_bytes()
    cache.check(url)
    with pytest.raises(ValueError, match="ended with exit 3"):
        cache.check("pipe:exit 3; x://t.tar")
    with pytest.raises(RemoteError, match="ended with exit 4"):
        cache.fetch("pipe:cat /dev/null; exit 4; x://t.tar")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path) -> None:
    """Of a busy server, and one that hangs up; never of 403, 404 and 410."""
    shard = indexed(write_shards(prompts(2), server.folder, "t", 2))[0]
    url = f"{server.url}/{shard.name}"
    for statuses, tries in (([503, 0], 3), ([429], 2), ([500, 502], 3)):
        server.failing[shard.name], server.asked = list(statuses), []
        with pytest.warns(UserWarning, match=r"t-00000\.tar.*; trying again in 0 s"):
            download(url, tmp_path / "copy")
        assert len(server.asked) == tries and (tmp_path / "copy").read_bytes() == shard.read_bytes()
    for status in (403, 404, 410, 416):
        server.failing[shard.name], server.asked = [status], []
        with pytest.raises(RemoteError, match=f"^HTTP {status} for {re.escape(url)}"):
            download(url, tmp_path / "copy")
        assert len(server.asked) == 1
    server.failing[shard.name] = [503, 503, 503]
    with pytest.raises(RemoteError, match="HTTP 503"):
        download(url, tmp_path / "copy")
    server.failing[f"{shard.name}.index.json"] = [503, 503, 503]
    with pytest.raises(OSError, match=r"HTTP 503 for .*index\.json"):  # not: there is none
        ShardDataset([url], cache=ShardCache(tmp_path / "cache", BIG))
    server.failing[f"{shard.name}.index.json"] = [403]
    assert len(ShardDataset([url], cache=ShardCache(tmp_path / "cache", BIG))) == 2
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1"):
        read_all("http://127.0.0.1:9/t.tar?sig=secret")


def test_what_is_known_without_reading(server: Server, bucket: type[Bucket]) -> None:
    (server.folder / "a.jsonl").write_bytes(b"12345")
    found = file_of(f"{server.url}/a.jsonl")
    assert found.size == 5 and found.version.startswith("ETag ")
    (server.folder / "a.jsonl").write_bytes(b"54321")
    assert file_of(f"{server.url}/a.jsonl").version != found.version
    server.signature = "right"
    with pytest.raises(RemoteError, match="HTTP 403 for"):  # fsspec itself says of it that it is not there
        file_of(f"{server.url}/a.jsonl?sig=wrong")
    fsspec.filesystem("bucket").pipe_file("bucket://b/x.parquet", b"123")
    assert file_of("bucket://b/x.parquet").size == 3
    with pytest.raises(RemoteError, match="it is a folder"):
        file_of("bucket://b")


def test_a_redirection_leads_to_http_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret.tar").write_bytes(b"x")
    for target in (f"file://{tmp_path}/secret.tar", "ftp://host/t.tar"):
        server.redirect = target
        with pytest.raises(RemoteError):
            download(f"{server.url}/t.tar", tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and set(server.asked) == {"t.tar"} and len(server.asked) == 2


def test_a_url_is_asked_for_as_it_is_written(server: Server) -> None:
    """A signature is of the text: %2F stays %2F."""
    (server.folder / "a.jsonl").write_bytes(b"1")
    server.signature = "sig=a%2Fb%2Bc%3D"
    assert read_all(f"{server.url}/a.jsonl?sig=a%2Fb%2Bc%3D") == b"1"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, url, package in (
        ("s3fs", "s3://b/t.tar", "s3fs"),
        ("gcsfs", "gs://b/t.tar", "gcsfs"),
        ("huggingface_hub", "hf://datasets/a/b/t.tar", "huggingface_hub"),
        ("aiohttp", "https://h/t.tar?sig=secret", "aiohttp"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)  # as if it were not installed
            known = sys.modules["fsspec.registry"]._registry  # pyright: ignore[reportAttributeAccessIssue]
            patch.delitem(known, url.partition(":")[0], raising=False)
            patch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
            with pytest.raises(ValueError, match=f"needs the package {package}: pip install 'megatron_sr1") as refused:
                check_openable(url)
            assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="nothing here opens such a URL"):
        check_openable("zzz://h/t.tar")


def test_the_words_of_an_error_lose_what_signs_the_url() -> None:
    url = "https://user:pa55@h/get?file=t.tar&X-Amz-Signature=s%2Fecret"
    for text in (f"no route to {url}", "host user:pa55@h", "GET /get?file=t.tar&X-Amz-Signature=s/ecret", "s%2Fecret"):
        said = str(remote_error(ConnectionError(text), url))
        assert not any(secret in said for secret in ("pa55", "s%2Fecret", "s/ecret")), said
    assert "ConnectionError: refused by t.tar" in str(remote_error(ConnectionError("refused by t.tar"), url))


def test_errors_of_the_hub_are_understood() -> None:
    """The package asks with httpx, or with httpx2 since its release 2; no request leaves the machine."""
    import httpx
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    asked = httpx.Request("GET", "https://huggingface.co/x?token=secret")
    url = "hf://datasets/a/b/x.parquet"
    for status, refused in ((503, False), (429, False), (403, True)):
        kind = GatedRepoError if status == 403 else HfHubHTTPError
        error = remote_error(kind("said", response=httpx.Response(status, request=asked)), url)
        assert f"HTTP {status} for {url}" in str(error) and error.refused is refused
    for module in (httpx, httpx2):
        slow = module.ConnectTimeout("slow", request=module.Request("GET", str(asked.url)))
        assert isinstance(slow, foreign_errors("hf")) and not remote_error(slow, url).refused
    with pytest.raises(foreign_errors("hf")) as caught:
        get_session().get("http://127.0.0.1:1/x")
    assert f"{url}: ConnectError" in str(remote_error(caught.value, url))
    assert remote_error(FileNotFoundError("x"), url).refused


# ---------------------------------------------------------------- signatures
def signed(url: str, signature: str) -> str:
    return f"{url}?X-Amz-Algorithm=AWS4&X-Amz-Expires=60&X-Amz-Signature={signature}"


@pytest.mark.parametrize("with_index", [True, False])
def test_a_renewed_signature_changes_nothing(server: Server, tmp_path: Path, with_index: bool) -> None:
    """Neither the fingerprint nor a name; nothing is downloaded again; and the index is found beside the path."""
    shards = write_shards(prompts(4), server.folder, "t", 2)
    if with_index:
        indexed(shards)
    cache = ShardCache(tmp_path / "cache", BIG)
    fingerprints, places = set(), set()
    for server.signature in ("secret-1", "secret-2"):
        server.asked.clear()
        urls = [signed(f"{server.url}/{shard.name}", server.signature) for shard in shards]
        made = ShardDataset(urls, cache=cache)
        assert all(equal(made.read(i), prompts(4)[i]) for i in range(4))
        fingerprints.add(made.fingerprint)
        places |= {made.place(i) for i in range(4)} | set(made.shard_fingerprints)
        assert f"{shards[0].name}.index.json" in server.asked and "secret" not in made.where(0)
    assert server.asked.count(shards[0].name) == 1, "looked at, not downloaded"
    assert fingerprints == {ShardDataset(shards).fingerprint} and "secret" not in repr(places)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_no_message_has_a_signature(server: Server, tmp_path: Path) -> None:
    shard = indexed(write_shards(big_prompts(2), server.folder, "t", 2))[0]
    server.signature, cache = "right", ShardCache(tmp_path / "cache", BIG)
    url = server.url.replace("//", "//user:secret@") + f"/{shard.name}"
    with pytest.raises(ValueError, match=r"HTTP 403 for .*: renew its signature") as refused:
        ShardDataset([signed(url, "secret")], cache=cache)
    dataset = ShardDataset([signed(url, "right-secret")], cache=cache)
    server.signature = "another"
    with pytest.raises(OSError, match="HTTP 403 for") as expired:
        dataset.read(0)
    server.signature = ""
    server.cut.add(shard.name)
    with pytest.raises(OSError, match="ClientPayloadError") as torn:
        dataset.read(0)
    with pytest.raises(ValueError, match="nothing here opens such a URL") as unknown:
        ShardDataset(["zzz://host/t.tar?token=secret"], cache=cache)
    with pytest.raises(ValueError, match="there is no cache") as without:
        ShardDataset([signed(url, "secret")])
    for error in (refused, expired, torn, unknown, without):
        shown_to_users = "".join(traceback.format_exception(error.value, limit=0))
        assert "secret" not in shown_to_users, shown_to_users


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("https://h/a/t.tar?sig=1&se=2&sv=3", "https://h/a/t.tar?sig=4&se=5&sv=3", True),
        ("https://u:p@h/a/t.tar?Expires=1&Signature=2&Key-Pair-Id=3", "https://h/a/t.tar", True),
        ("https://h/get?file=t-0.tar&token=1", "https://h/get?token=2&file=t-0.tar", True),
        ("https://h/get?file=t-0.tar", "https://h/get?file=t-1.tar", False),
        ("https://h/get?id=1", "https://h/get?id=2", False),
        ("https://h/get?key=train.tar", "https://h/get?key=test.tar", False),
        ("https://h/get?object_key=a", "https://h/get?object_key=b", False),
        ("https://h/get?set=train&sub=1", "https://h/get?set=test&sub=1", False),
        ("https://h/get?design=a&author=1", "https://h/get?design=b&author=1", False),
        ("https://h/get?se=train", "https://h/get?se=test", False),  # Azure's only beside its sig
        ("https://h/get?f=1&se=a&sp=r&sig=1", "https://h/get?f=1&se=b&sp=r&sig=2", True),
        ("https://h/get?f=1&X-Amz-Date=1&X-Amz-Signature=2", "https://h/get?f=1&X-Amz-Date=3&X-Amz-Signature=4", True),
        ("https://h/get?f=1&AWSAccessKeyId=a&Expires=1", "https://h/get?f=1&AWSAccessKeyId=b&Expires=2", True),
        ("https://h/get?f=1&access_token=a&api_key=1", "https://h/get?f=1&access_token=b&api_key=2", True),
        ("s3://b/a/t-0.tar", "s3://b/a/t-1.tar", False),
        ("pipe:curl -s 'https://h/t.tar?sig=1'", "pipe:curl -s 'https://h/t.tar?sig=2'", True),
    ],
)
def test_what_identifies_a_file(one: str, other: str, same: bool) -> None:
    assert (same_file(one) == same_file(other)) is same
    assert (shard_name(one) == shard_name(other)) is same
    assert not any(mark in shown(one) for mark in ("?", "@", "token"))


def test_of_a_path_that_names_a_tar_the_query_is_no_name() -> None:
    """But a version is another file to the cache."""
    one, other = (f"https://h/t.tar?versionId={version}" for version in "ab")
    assert shard_name(one) == shard_name(other) == "t.tar" and same_file(one) != same_file(other)
    assert beside(one, ".index.json") == "https://h/t.tar.index.json?versionId=a"
