"""What people write into launch settings runs nowhere and is written nowhere that it must not be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_sr1.config import ConfigError
from megatron_sr1.launch.experiment import Step
from megatron_sr1.launch.script import local_script
from megatron_sr1.launch.settings import LaunchSettings, load_settings


@pytest.mark.parametrize(
    "name", ["AUTH", "PASSWD", "MY_PASS", "PGPASSWD", "DB_PWD", "PASSPHRASE", "GITHUB_PAT", "X_AUTH", "DB_PW", "A_DSN"]
)
def test_what_sounds_like_a_secret_is_no_variable(name: str) -> None:
    with pytest.raises(ConfigError, match=f"variables.{name} looks like a secret"):
        load_settings(None, [f"variables.{name}=x"])


def test_a_url_with_a_password_is_one() -> None:
    with pytest.raises(ConfigError, match=r"variables\.HTTP_PROXY looks like a secret"):
        load_settings(None, ["variables.HTTP_PROXY='http://me:mine@proxy:3128'"])
    assert load_settings(None, ["variables.HTTP_PROXY='http://proxy:3128'"]).variables


@pytest.mark.parametrize("name", ["AUTHOR", "PATTERN", "PATH", "CREDIT", "PASS_THROUGH"])
def test_what_does_not_may_be_one(name: str) -> None:
    assert load_settings(None, [f"variables.{name}=x"]).variables == {name: "x"}


@pytest.mark.parametrize(
    "value", ["with space", "$(touch ran)", "`id`", "a;b", "a&b", "it's", "a*", "line\nbreak", "a|b"]
)
def test_what_nemo_run_writes_without_quotes_is_plain(value: str, tmp_path: Path) -> None:
    """It quotes none of them: `mkdir -p <logs>` runs here, and the batch script has the others."""
    quoted = json.dumps(value)
    folder = json.dumps(str(tmp_path / value))
    for overrides in (
        [f"workdir={folder}", "logs=/logs"],
        [f"logs={folder}"],
        [f"slurm.account={quoted}"],
        [f"container.image={quoted}"],
        ["container.image=x", f"container.mounts=[{json.dumps('/' + value + ':/in')}]"],
        [f"slurm.extra={{{quoted}: x}}"],
    ):
        key = overrides[-1].partition("=")[0] if "workdir" not in overrides[0] else "workdir"
        with pytest.raises(ConfigError, match=f"^{key}.*it must be .*(without|letters|name of an option)"):
            load_settings(None, ["executor=slurm", *overrides])
    with pytest.raises(ConfigError, match=r"^workdir=.*without spaces, ':', ','"):
        load_settings(None, ["executor=docker", "container.image=x", f"workdir={folder}", "logs=/logs"])
    assert load_settings(None, [f"workdir={folder}"]).folder.name == value, "on this machine scripts quote it"


def test_a_parameter_of_sbatch_is_one_line() -> None:
    for key in ("slurm.partition", "slurm.qos", "slurm.mem", "slurm.time", "slurm.signal", "slurm.extra.comment"):
        with pytest.raises(ConfigError, match=f"^{key}=.* it must be one line"):
            load_settings(None, [f'{key}="a\\ntouch ran"'])
    settings = load_settings(None, ["executor=slurm", "slurm.extra.constraint='h100&(a|b)'", "slurm.qos='a b'"])
    assert settings.slurm.extra == {"constraint": "h100&(a|b)"}, "sbatch reads quotes, and gets them"


@pytest.mark.parametrize("name", ["with space", "$(touch ran)", "`touch ran`", "a; touch ran", "it's", 'a"b'])
def test_a_folder_s_name_is_only_a_name(name: str, tmp_path: Path) -> None:
    """Nothing in it runs, and the script removes its own mark and nothing else."""
    folder = tmp_path / name
    folder.mkdir()
    settings = LaunchSettings(workdir=str(folder), python="true")
    marks = folder / "marks"
    script = tmp_path / "script.sh"
    script.write_text(local_script("b", Step("b", "grpo", ("c.yaml",)), settings, marks, []))
    others = {
        path: path.write_text("mine") for path in (tmp_path / name.split()[0], tmp_path / "b") if not path.exists()
    }
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in marks.iterdir()] == ["b"]
    assert all(path.read_text() == "mine" for path in others)
    assert not (tmp_path / "ran").exists() and not (folder / "ran").exists()
