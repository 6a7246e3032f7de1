"""A lock on a run's folder, so that two runs never write to the same one at the same time.

The lock is on the file ``run.lock`` in the folder, and the operating system frees it when its
process ends, however it ends. The file itself stays, because removing it would let a third run
lock a new file while a second one holds the removed one.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparseffn_jax.train import processes

_FILE = "run.lock"


class RunFolderError(OSError):
    """A run's folder cannot be taken, because another run is writing to it."""


@contextlib.contextmanager
def hold_run_folder(folder: str | Path) -> Iterator[None]:
    """Keeps every other run out of ``folder`` while the context lasts.

    A caller that trains in several folders below one of its own holds its own, and
    :func:`~sparseffn_jax.train.loop.train` holds each of the others; the same folder cannot be
    held twice, not even by one process. Of the processes of a distributed run the first one holds
    the folder, and all must enter the context together.

    Where the file system or the operating system has no locks, a ``RuntimeWarning`` says so, and
    nothing is held.

    Args:
      folder: the run's folder; created if it is not there.

    Raises:
      RunFolderError: if another run holds the folder; the message names its process and host.
      OSError: if the folder or its lock file cannot be created.
    """
    folder = Path(folder).absolute()
    failure: OSError | None = None
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if processes.is_first():
                held.callback(os.close, _lock(folder / _FILE))
        except OSError as error:
            failure = error
        # All processes must hear of a failure: those without one would wait for the others.
        has_failed = processes.agree_on_largest(int(failure is not None))
        if failure is not None:
            raise failure
        if has_failed:
            raise RunFolderError(
                f"{folder} cannot be taken for this run: another of its processes was refused it, "
                f"and its error says why ({_holder(folder / _FILE)})"
            )
        yield


def _lock(file: Path) -> int:
    """Returns a descriptor of ``file`` that has the lock until it is closed."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor)
    # Some network file systems report a lock that another host holds as a lack of permission.
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise RunFolderError(
            f"{file.parent} is in use: {_holder(file)}. Wait until it has ended, stop it, or give "
            "another folder"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{file.parent} cannot be locked ({error.strerror}): make sure that no second run is "
            "started there before this one has ended",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        _write_holder(descriptor)
    return descriptor


def _flock(descriptor: int) -> None:
    # Windows has no such module.
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "the operating system has no flock") from None
    # Not lockf: its lock belongs to the process, so it lets a second thread in, and it is lost as
    # soon as anything in the process opens and closes the file, as copying the folder does. Over
    # NFS, Linux (since 2.6.12) and over SMB (since 5.5) turn flock into the lock on the server
    # that lockf asks for, so that it keeps other hosts out as well. Not the filelock package: where
    # there is no flock it marks the folder with a file, which a killed process leaves behind.
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_holder(descriptor: int) -> None:
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    # The lock counts without its record, so a full disk that cannot take it does not matter.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        # Brings the record to a network file system's server, where other hosts read it.
        os.fsync(descriptor)


def _holder(file: Path) -> str:
    """Says who holds the lock, as far as the lock file tells."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return (
            f"process {holder['pid']} on host {holder['host']} has been running there since "
            f"{holder['started']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is running there"
