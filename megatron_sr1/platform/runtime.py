"""What machine this is: device, collective backend, and the process group of a run."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed import (
    FileStore,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.multiprocessing.spawn import ProcessContext, ProcessException, ProcessExitedException, start_processes

from megatron_sr1.config.mistakes import EXPECTED_ERRORS, MISTAKE_STATUS, one_line
from megatron_sr1.phases import WAIT, during
from megatron_sr1.platform.accelerator import Accelerator, find_accelerator
from megatron_sr1.platform.board import CAUSE
from megatron_sr1.platform.cpu_shim import install_cpu_shim, patch_megatron
from megatron_sr1.platform.environment import check_environment
from megatron_sr1.platform.fork_server import STOP_SIGNALS, begin_rank, held_back, start_fork_server, without_collecting
from megatron_sr1.platform.joining import TIMEOUT, join, open_store
from megatron_sr1.platform.ranks import GroupRanks
from megatron_sr1.platform.torch_private import job_store
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.platform.watchdog import GONE, HUNG_STATUS
from megatron_sr1.ranks import Element
from megatron_sr1.signals import handled

STOPPED_STATUS = os.EX_TEMPFAIL  # 75, sysexits.h: "the user is invited to retry"; of a run that was asked to stop
_OUTSIDE = "asked to stop outside of the steps; the same command goes on from what is saved"
_MISTAKES = "mistake{}.txt"  # by rank: the message that it ended with
_LEAST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two questions whether all ranks are there
_WAITS = itertools.count()  # every rank counts alike
_KILLED = ", by hand or because the memory ran out"
_GRACE_SECONDS = 3.0  # for the ranks beside one that ended, to end too


@dataclass(frozen=True)
class Platform:
    """Device of this process, and its place among the ranks."""

    device: torch.device
    rank: int
    world_size: int
    accelerator: Accelerator | None = None  # None: the CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def ranks(self) -> GroupRanks:
        """All ranks of the job."""
        return GroupRanks(device=self.device)

    def on_main(self, work: Callable[[], Element], *, longest: timedelta | None = None) -> Element:
        """The main rank's result on every rank; so is its ValueError. Collective.

        Args:
            longest: how long the others may have to wait for it, where that is more than for anything else.
        """
        patient: Any = None if longest is None else torch.distributed.new_group(backend="gloo", timeout=longest)
        outcome: list[tuple[Any, str]] = []
        if self.is_main:
            try:
                with during("what the main rank does alone", None if longest is None else longest.total_seconds()):
                    outcome.append((work(), ""))
            except ValueError as error:
                outcome.append((None, str(error)))
        if patient is not None:
            with during(WAIT):
                torch.distributed.barrier(patient)
            torch.distributed.destroy_process_group(patient)
        ((result, refusal),) = self.ranks.gather(outcome)
        if refusal:
            raise ValueError(refusal)
        return result

    def wait_for_all(self) -> None:
        """Waits until all ranks are here, however long that takes: a collective gives up after its group's timeout.
        Collective."""
        if self.world_size == 1:
            return
        store, name, pause = job_store(), f"waits/{next(_WAITS)}", _LEAST_PAUSE
        store.add(name, 1)
        with during(WAIT):
            while store.add(name, 0) < self.world_size:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def meeting_place(self) -> tuple[str, int] | None:
        """Address and port at which the ranks met; None: they met over a file, or there is one alone."""
        store = job_store()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        return (store.host, store.port) if isinstance(store, TCPStore) else None

    def card_memory(self) -> tuple[int, int]:
        """Bytes of this rank's accelerator, and what of them other processes have taken, about; (0, 0) on a CPU."""
        if self.on_cpu:
            return 0, 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total, max(0, total - free - torch.cuda.memory_reserved(self.device))

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


def run_on_ranks(
    function: Callable[..., None],
    num_ranks: int,
    *arguments: Any,
    imports: Sequence[str] = (),
    timeout: timedelta = TIMEOUT,
) -> None:
    """Calls `function(*arguments)` on `num_ranks` processes of this machine that form one process group.

    Under torchrun or srun, which have started the ranks already, it calls `function` here. Ranks that are started here
    meet over a file and talk over loopback only; when one fails, or this process dies, the others are stopped. A first
    SIGTERM, SIGUSR1 or Ctrl-C to this process is passed on to them as SIGUSR1, a second SIGTERM or Ctrl-C kills them.

    Args:
        imports: modules that `function` will import; on a CPU this is done first, once for all ranks (fork_server.py).
        timeout: of the process group that is made here.

    Raises:
        ValueError: a rank ended with an error that a person can put right; its message. See `check_environment`.
        torch.multiprocessing.ProcessException: a rank failed; the message holds its traceback.
        SystemExit: the ranks were asked to stop and did, with STOPPED_STATUS; they hung, with HUNG_STATUS; one was
            killed, with 128 and the signal's number.
    """
    check_environment()
    if os.environ.get("RANK") or num_ranks == 1:
        with _ended_outside_steps():
            if not torch.cuda.is_available():
                with without_collecting():
                    prepare_process()
                    for name in imports:
                        import_module(name)
            function(*arguments)
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_rank(num_ranks)))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it warns of each rank that it ends
    forked = sys.platform == "linux" and not torch.cuda.is_available()
    if forked:
        with _lost_fork_server_told():
            start_fork_server(imports)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, folder, timeout, function, arguments)
        with ExitStack() as stack:
            with held_back({signal.SIGINT}):  # by the ranks, too: Ctrl-C reaches them by this process
                method = "forkserver" if forked else "spawn"
                with _lost_fork_server_told():
                    ranks = start_processes(_run_rank, arguments, num_ranks, join=False, start_method=method)
                assert isinstance(ranks, ProcessContext)  # it does not wait for them
                received = stack.enter_context(_passing_on_signals(ranks))
            try:
                while not ranks.join(grace_period=_GRACE_SECONDS):
                    pass
            except ProcessException as error:
                _explain(error, Path(folder), bool(received))
                raise


@contextmanager
def _ended_outside_steps() -> Iterator[None]:
    """While it lasts, this rank, which nothing has started from here, ends on a stop signal: where it is within its
    steps, `watch_for_stop` takes the signal first."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(_OUTSIDE, flush=True)
        os._exit(STOPPED_STATUS)  # as without a handler: what a library does at its end may wait for other ranks

    with handled((signal.SIGTERM, signal.SIGUSR1), end):
        yield


def _explain(error: ProcessException, folder: Path, asked: bool) -> None:
    """Ends the command in plainer words than the error of the ranks, where there are any: those of the first."""
    messages = sorted(folder.glob(_MISTAKES.format("*")), key=lambda path: path.stat().st_mtime_ns)
    for message in messages:
        raise ValueError(message.read_text(encoding="utf-8")) from error
    if not isinstance(error, ProcessExitedException):
        return
    if error.exit_code == STOPPED_STATUS:
        sys.exit(STOPPED_STATUS)
    if asked and error.signal_name in ("SIGTERM", "SIGUSR1"):  # a rank that is asked outside its steps just ends
        print(_OUTSIDE, flush=True)
        sys.exit(STOPPED_STATUS)
    cause = (folder / CAUSE).read_text(encoding="utf-8") if (folder / CAUSE).exists() else ""
    if error.exit_code == HUNG_STATUS or (cause and GONE not in cause):  # the rank that has found it has said it
        sys.exit(HUNG_STATUS)
    number = abs(error.exit_code)
    how = f"was ended by {error.signal_name}" if error.signal_name else f"ended with status {error.exit_code}"
    if error.signal_name == "SIGKILL":
        how += _KILLED
    _end_after_loss(f"rank {error.error_index} {how}", 128 + number if error.signal_name else number)


@contextmanager
def _lost_fork_server_told() -> Iterator[None]:
    """While it lasts, the process that ranks are forked from must answer."""
    try:
        yield
    except (EOFError, ConnectionError):
        _end_after_loss(f"the process that ranks are forked from was ended{_KILLED}", 128 + signal.SIGKILL)


def _end_after_loss(what: str, status: int) -> NoReturn:
    text = f"megatron-sr1: {what}, so all others are ended; the same command goes on from what is saved"
    print(text, file=sys.stderr, flush=True)
    sys.exit(status)


@contextmanager
def _passing_on_signals(ranks: torch.multiprocessing.ProcessContext) -> Iterator[list[int]]:
    """While it lasts, a stop signal to this process goes to the ranks; gives the list of those received."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and number in received:
            for process in ranks.processes:
                process.kill()
            sys.exit(128 + number)
        received.append(number)
        for process in ranks.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)

    with handled(STOP_SIGNALS, receive):
        yield received


def _run_rank(
    rank: int,
    num_ranks: int,
    folder: str,
    timeout: timedelta,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    begin_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    join(FileStore(str(Path(folder) / "store"), num_ranks), rank, num_ranks, _backend(), timeout)
    status = 0
    try:
        function(*arguments)
    except SystemExit as stopped:
        status = stopped.code
    except EXPECTED_ERRORS as error:
        (Path(folder) / _MISTAKES.format(rank)).write_text(one_line(error), encoding="utf-8")
        sys.stdout.flush()
        os._exit(
            MISTAKE_STATUS
        )  # the interpreter's own end would wait for the group, whose other ranks wait for this one
    torch.distributed.destroy_process_group()
    sys.exit(status)


def start_platform(timeout: timedelta = TIMEOUT) -> Platform:
    """Prepares this process: patches Megatron-Core where there is no accelerator, joins the process group.

    A process that is in no group yet joins the one that torchrun's environment names; without that it is alone. Call it
    before anything imports Megatron-Core.

    Args:
        timeout: of the process group, where it is made here.
    """
    on_cpu = prepare_process()
    atexit.register(_end_quietly)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not on_cpu:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        if torch.distributed.is_torchelastic_launched():  # torchrun has waited for all ranks, and keeps their store
            torch.distributed.init_process_group(_backend(), timeout=timeout)
        elif os.environ.get("RANK"):
            rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = open_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, timeout)
            join(store, rank, num_ranks, _backend(), timeout)
        else:
            join_alone()
    if on_cpu:
        patch_megatron()
        if not os.environ.get("OMP_NUM_THREADS"):  # else torch has taken what it says
            here = os.environ.get("LOCAL_WORLD_SIZE") or torch.distributed.get_world_size()
            torch.set_num_threads(_threads_per_rank(int(here)))
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Platform(device, rank, world_size, find_accelerator(device))


def prepare_process() -> bool:
    """The part of `start_platform` that no process group is needed for. Whether there is no accelerator."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        install_cpu_shim()
        # Megatron-Core says on every import that apex and Transformer Engine are absent: here that is as it should be
        warnings.filterwarnings("ignore", module="megatron.*")
        # torch renames collectives that Megatron-Core and vLLM still call by their old names
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.")
        # and the sharded tensors that Megatron-Core's checkpoints are made of
        warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor")
    define_missing_torchvision_ops()
    _quieten_transformers()
    return on_cpu


def join_alone() -> None:
    """Makes a process group of this process only."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(_backend(), timeout=TIMEOUT, store=store, rank=0, world_size=1)


def _quieten_transformers() -> None:
    """Its bars and hints speak of loading a model from the command line; runs have bars and errors of their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _end_quietly() -> None:
    """All is said: after this, compiled libraries print pages about objects they still hold."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _threads_per_rank(num_ranks: int) -> int:
    """`num_ranks`: of this machine."""
    return max(1, (os.cpu_count() or 1) // num_ranks)
