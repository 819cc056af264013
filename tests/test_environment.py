"""What of its environment a run cannot start with is one line."""

from __future__ import annotations

import resource
import tempfile

import pytest

from megatron_sr1.platform import environment


@pytest.mark.parametrize("named", ["", "lo", ","])
def test_interfaces_that_are_there(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    environment.check_environment()


@pytest.mark.parametrize("named", ["nonexistent", "lo,nonexistent"])
def test_an_interface_that_is_not_there(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    with pytest.raises(ValueError, match=r"no interface 'nonexistent', but .*lo"):
        environment.check_environment()


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with pytest.raises(ValueError, match=r"may open 64 files.*ulimit -n"):
        environment.check_environment()


def test_a_temporary_folder_that_sockets_do_not_fit_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "a" * 74)
    environment.check_environment()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "a" * 75)
    with pytest.raises(ValueError, match="set TMPDIR to one of at most 75 bytes"):
        environment.check_environment()
