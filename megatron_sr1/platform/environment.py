"""What of its environment no rank can start with: it would be an error of a library else, without a name."""

from __future__ import annotations

import os
import resource
import socket
import tempfile

INTERFACES = "GLOO_SOCKET_IFNAME"
LEAST_FILES = 128  # a rank alone opens some 80 before its engine starts
# bytes of a socket's path, without the zero at its end, and what multiprocessing puts behind the temporary folder:
# "/pymp-" and "/listener-" with eight characters each
_SOCKET_PATH = 107
_SOCKET_NAME = len("/pymp-01234567/listener-01234567")


def check_environment() -> None:
    """Of this process, before any rank is started.

    Raises:
        ValueError: an interface that this machine does not have, too few open files, or a temporary folder whose name
            is too long.
    """
    _check_interfaces(os.environ.get(INTERFACES, ""))
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < LEAST_FILES:
        raise ValueError(
            f"this process may open {most} files, and a rank needs {LEAST_FILES} and more: ulimit -n 65536 before the "
            "command, or LimitNOFILE of the service."
        )
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) + _SOCKET_NAME > _SOCKET_PATH:
        raise ValueError(
            f"the temporary folder {folder} has too long a name for the sockets in it: set TMPDIR to one of at most "
            f"{_SOCKET_PATH - _SOCKET_NAME} bytes."
        )


def _check_interfaces(named: str) -> None:
    known = [name for _, name in socket.if_nameindex()]
    missing = [name for name in named.split(",") if name and name not in known]
    if missing:
        raise ValueError(
            f"{INTERFACES}={named!r} in the environment is not allowed: this machine has no interface {missing[0]!r}, "
            f"but {', '.join(known)}. Name one of these, or unset it."
        )
