"""No run folder, comparison or message has what a presigned URL is signed with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.config import ConfigError, changes_of, check_resume, dump_config, load_config, read_overrides
from megatron_sr1.config.credentials import without_credentials
from megatron_sr1.config.mistakes import one_line
from megatron_sr1.evaluation import check_same_data, keep_identity

SIGNED = "https://user:secret@host/train-{00..07}.tar?X-Amz-Date=1&X-Amz-Signature=secret"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (SIGNED, "https://host/train-{00..07}.tar"),
        ("https://host/t.tar?versionId=a&sig=secret&sv=1", "https://host/t.tar?versionId=a"),
        ("https://host/t.tar?hdnea=secret", "https://host/t.tar"),
        ("https://host/get?file=t-{0..3}.tar&token=secret", "https://host/get?file=t-{0..3}.tar"),
        ("s3://bucket/t.tar", "s3://bucket/t.tar"),
        ("data/set[v2]/train-*.tar", "data/set[v2]/train-*.tar"),
        ("data/what?.tar", "data/what?.tar"),
        (
            "pipe:curl -s -H 'Authorization: Bearer secret' 'https://host/t.tar?sig=secret'",
            "pipe:curl -s -H ... 'https://host/t.tar'",
        ),
    ],
)
def test_what_is_kept_of_a_url(url: str, kept: str) -> None:
    assert without_credentials(url) == kept
    assert without_credentials(kept) == kept


def _signed(folder: Path, signature: str) -> list[str]:
    lists = ("train", "cold_start", "heldout")
    urls = [f"data.{name}=['https://host/{name}.tar?X-Amz-Signature={signature}']" for name in lists]
    return [f"run_dir={folder}", *urls]


def test_a_run_goes_on_with_a_renewed_signature_and_keeps_none(tmp_path: Path) -> None:
    config = load_config(None, _signed(tmp_path, "secret-1"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert "secret" not in dump_config(config)
    renewed = load_config(None, _signed(tmp_path, "secret-2"))
    assert "secret-2" in renewed.data.train[0] and changes_of(renewed) == []
    assert load_config(tmp_path / "config.yaml", []).data.heldout == ("https://host/heldout.tar",)
    (tmp_path / "config.yaml").write_text(dump_config(config).replace("heldout.tar", "heldout.tar?sig=secret-0"))
    assert changes_of(renewed) == []
    other = replace(renewed, data=replace(renewed.data, train=("https://host/other.tar?sig=secret-3",)))
    (change,) = changes_of(other)
    assert str(change) == "data.train was ['https://host/train.tar'] and is ['https://host/other.tar']"


def test_no_line_of_a_command_has_a_signature() -> None:
    with pytest.raises(ConfigError) as refused:
        read_overrides([f"data.train=[{SIGNED}"])
    for error in (refused.value, ValueError(f"no shard at '{SIGNED}'."), OSError(2, "absent", SIGNED)):
        assert "secret" not in one_line(error) and "host/train-" in one_line(error)
    assert one_line(ValueError("is it so? see https://host/page")) == "is it so? see https://host/page"


def test_heldout_data_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    """A run may spell `data.heldout` otherwise; other samples are refused once it was evaluated."""
    config = load_config(None, [f"run_dir={tmp_path}", "data.heldout=[a.tar]"])
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    check_resume(replace(config, data=replace(config.data, heldout=("./a.tar",))))
    kept = tmp_path / "eval" / "identity" / "before.json"
    check_same_data(kept, "1", "runs/x")
    keep_identity(kept, {"the data": "1", "seed": 1})
    check_same_data(kept, "1", "runs/x")
    with pytest.raises(ValueError, match=r"holds another run: data\.heldout had other samples"):
        check_same_data(kept, "2", "runs/x")
    for damaged in ("{", json.dumps(["1"]), "{}"):
        kept.write_text(damaged)
        with pytest.raises(ValueError, match=r"before\.json is damaged"):
            check_same_data(kept, "1", "runs/x")
