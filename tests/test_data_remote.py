"""Shards behind URLs: a real HTTP server, webdataset's own openers, the cache on this machine."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import stat
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_sr1.config import DataConfig
from megatron_sr1.data import Quarantine, SampleFeed, ShardDataset, expand_shards, open_stream, write_shards
from megatron_sr1.data.index import index_path
from megatron_sr1.data.remote import ShardCache
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    made = Server(tmp_path / "www")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].strip("/")
            made.asked.append(name)
            if not (made.folder / name).is_file():
                self.send_error(404)
                return
            if made.signature and made.signature not in self.path:
                self.send_error(403)
                return
            data = (made.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the reader had enough
                self.wfile.write(data[: len(data) // 2] if name in made.cut else data)

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
    with pytest.raises(OSError, match="exit 18"):  # curl: partial file
        dataset.read(0)
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


def test_s3_goes_through_the_aws_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `aws s3 cp --no-progress s3://bucket/name -` that reads a folder."""
    shard = indexed(write_shards(prompts(2), tmp_path / "bucket", "t", 2))[0]
    script = tmp_path / "bin" / "aws"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2 $3 $5" = "s3 cp --no-progress -" ] || exit 9\n'
        f'exec cat "{tmp_path}/bucket/${{4#s3://bucket/}}" 2>/dev/null\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    dataset = ShardDataset(["s3://bucket/t-00000.tar"], cache=ShardCache(tmp_path / "cache", BIG))
    assert equal(dataset.read(1), prompts(2)[1])
    index_path(shard).unlink()
    assert len(ShardDataset(["s3://bucket/t-00000.tar"], cache=ShardCache(tmp_path / "cache2", BIG))) == 2
    with pytest.raises(ValueError, match=r"s3://bucket/absent\.tar: the shard cannot be opened"):
        ShardDataset(["s3://bucket/absent.tar"], cache=ShardCache(tmp_path / "cache", BIG))


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
    with pytest.raises(OSError, match="ended with exit 18") as torn:
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
