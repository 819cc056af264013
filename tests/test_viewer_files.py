"""The files of the viewer: what is safe in a script, the folder beside a page, the server that hands it out."""

from __future__ import annotations

import http.client
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from megatron_sr1.report.viewer import write
from megatron_sr1.report.viewer.filters import filters_of, mean_of, says_yes
from megatron_sr1.report.viewer.folder import ChunkFolder
from megatron_sr1.report.viewer.script_json import script_json
from megatron_sr1.report.viewer.server import report_server
from megatron_sr1.report.viewer.shown import joined_blocks
from megatron_sr1.report.viewer.steps import chosen_steps
from tests.viewer_cases import a_page


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "r_files").mkdir()
    (tmp_path / "r_files" / "mine").touch()
    with pytest.raises(ValueError, match="no report has made it"):
        ChunkFolder(tmp_path / "r.html")
    assert (tmp_path / "r_files" / "mine").exists()


def test_two_reports_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    one, two = ChunkFolder(tmp_path / "r.html"), ChunkFolder(tmp_path / "r.html")
    for folder in (one, two):
        folder.write(f"{folder.stamp}-x", [1])
    one.place()
    two.place()
    assert [path.name for path in (tmp_path / "r_files").glob("*.js")] == [f"{two.stamp}-x.js"] != [f"{one.stamp}-x.js"]
    assert (tmp_path / "r_files").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["r_files"]


def test_what_is_no_finite_number_is_neither_right_nor_wrong() -> None:
    assert [says_yes(value) for value in (math.nan, math.inf, [1.0, math.nan], [], 10**400)] == [None] * 5
    assert math.isnan(mean_of([math.inf, -math.inf])) and says_yes([1, 0]) is True and says_yes(0.4) is False
    wrong = filters_of({"acc": 1.0, "acc_vis": math.nan, "leak": math.inf}, "x", described=True, cut=False)
    assert wrong == {"not_finite"}


def test_json_is_safe_in_a_script() -> None:
    evil = {"</script><!--": "\u2028 <script> & ]]>", "n": [math.nan, math.inf, -math.inf, 0.5]}
    text = script_json(evil)
    assert text.isascii() and not {"<", ">", "&"} & set(text)
    assert json.loads(text) == evil | {"n": ["NaN", "Infinity", "-Infinity", 0.5]}


def test_which_steps_are_in_a_page(tmp_path: Path) -> None:
    saved = list(range(0, 100, 5))
    assert chosen_steps(saved, None, 50, tmp_path) == saved == chosen_steps(saved, [], 2, tmp_path)
    assert chosen_steps(saved, None, 3, tmp_path) == [0, 50, 95]
    assert chosen_steps(saved, [10, 5, 10], 1, tmp_path) == [5, 10] and chosen_steps([], [3], 2, tmp_path) == []
    with pytest.raises(ValueError, match=r"no rollouts of step 3\. It has those of 0, 5"):
        chosen_steps(saved, [3], 2, tmp_path)


def test_blocks_do_not_overlap() -> None:
    assert list(joined_blocks([("b", 5, 9), ("a", 0, 6), ("c", 7, 7), ("d", 9, 10)])) == [("a", 0, 6), ("d", 9, 10)]


# ---------------------------------------------------------------- the server
@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[..., tuple[int, bytes]]]]:
    monkeypatch.setattr(write, "INSIDE_BYTES", 0)
    page = a_page(tmp_path)
    (page.parent / "secret.js").write_text("no")
    (page.with_name("report_files") / "link.js").symlink_to(page.parent / "secret.js")
    with report_server(page) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1" and port

        def get(path: str, name: str = f"127.0.0.1:{port}") -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", name)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read()

        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield page, get
        server.shutdown()
        thread.join()


def test_the_server_has_the_report_and_nothing_else(served: tuple[Path, Callable[..., tuple[int, bytes]]]) -> None:
    page, get = served
    assert get("/") == (200, page.read_bytes()) == get("/report.html#run")
    (chunk,) = (page.parent / "report_files").glob("*-r0-s0.js")
    assert get(f"/report_files/{chunk.name}") == (200, chunk.read_bytes())
    image = next((page.parent / "report_files" / "images").iterdir())
    assert get(f"/report_files/images/{image.name}") == (200, image.read_bytes())
    outside = ["/secret.js", "/../page%20with%20%23/secret.js", "/report_files/../secret.js", "/report_files/link.js"]
    outside += ["/report_files/%2e%2e/secret.js", "/report_files", "/report_files/", "/report_files/none.js"]
    outside += [quote(str(page.parent / "secret.js")), "//etc/passwd", "/report_files/%00.js", "/report_files/.r0-p"]
    assert [get(path)[0] for path in outside] == [404] * len(outside)
    assert get("/", "evil.example")[0] == 403 and get("/", "")[0] == 403 and get("/", "localhost:9")[0] == 200


def test_a_port_that_is_taken_is_told(served: Any, tmp_path: Path) -> None:
    with report_server(tmp_path / "x.html") as one, pytest.raises(ValueError, match="cannot be had"):
        report_server(tmp_path / "x.html", port=int(one.server_address[1]))
