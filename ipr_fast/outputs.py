"""Output files and folders: atomic writes, JSON, sections of a README, locks, and checks before any work."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ipr_fast.errors import first_line

WRITING = ".writing"  # ends the name of a file until it is whole


@contextmanager
def replacing(path: str | os.PathLike, *, suffix: str = WRITING) -> Iterator[BinaryIO]:
    """Open a temporary binary file that replaces `path` atomically when the block ends.

    The file is synced before it is renamed: after a crash either the old or the new file is there, whole. If the block
    raises, the old file stays and the temporary one is removed. A link stays, and the file that it names is replaced.
    suffix: of the temporary file, which several processes that write the same file must not share.
    An OSError, or the RuntimeError that torch's writer raises instead, becomes an OSError that names `path` and the
    reason.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(target.name + suffix)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with temporary.open("w+b") as file:  # with "wb" numpy writes in C, and loses the reason of an error
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise type(cause)(cause.errno, cause.strerror, str(path)) from error


def _os_error(error: BaseException) -> OSError | None:
    """Return the OSError that stopped a writer, if any; torch's raises a RuntimeError, which may be chained to it."""
    if isinstance(error, OSError):
        return error if error.strerror else OSError(errno.EIO, str(error))
    if not isinstance(error, RuntimeError) or "inline_container" not in str(error):
        return None
    cause = error.__cause__ or error.__context__
    return cause if isinstance(cause, OSError) else OSError(errno.EIO, first_line(error))


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError that names the file and says that it is not `what`."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ValueError(f"{path}: not {what} ({reason})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not {what}")
    return value


def replace_sections(path: Path, sections: Mapping[str, str]) -> None:
    """Replace sections of a Markdown file, each between `<!-- NAME -->` and `<!-- /NAME -->`.

    sections: Markdown by name; those without markers in the file are left out. Raises ValueError if the file has none
    of them, or if markers are not there once and in order, and writes nothing then.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    found = [name for name in sections if f"<!-- {name} -->" in text or f"<!-- /{name} -->" in text]
    if not found:
        lines = " or ".join(f"<!-- {name} --> and <!-- /{name} -->" for name in sections)
        raise ValueError(f"{path}: needs the lines {lines}, once each and in this order")
    for name in found:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed or begin in rest or end in before + after:
            raise ValueError(f"{path}: needs the lines {begin} and {end}, once each and in this order")
        text = f"{before}{begin}\n{sections[name]}\n{end}{after}"
    with replacing(path) as file:
        file.write(text.encode())


def prepare_folder(path: Path) -> None:
    """Create a folder to write into, with its parents. Raises ValueError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made a folder ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path}: no permission to write in it")


def check_no_folders(paths: Iterable[Path]) -> None:
    """Raise ValueError if one of the files to be written is a folder."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, in the place of a file to be written")


def check_room(path: Path, existing: Path, num_bytes: int) -> None:
    """Raise ValueError if the disk of an existing file or folder lacks room for a file of `num_bytes` at `path`."""
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(f"{path}: takes {num_bytes:,} bytes, and the disk has room for {free:,}")


@contextmanager
def alone_in(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder or file: another process that wants it gets a ValueError. Does nothing where there are no locks.

    shared: other processes may hold it in the same way.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another run is at work there") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
