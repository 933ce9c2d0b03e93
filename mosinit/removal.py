"""What root once left in the way on a machine's volumes, removed: whatever it is, however deep it lies, and
also if it is marked as not to be changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from pathlib import Path

# linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS; FS_IMMUTABLE_FL and FS_APPEND_FL
_GET_FLAGS, _SET_FLAGS, _FIXED = 0x80086601, 0x40086602, 0x10 | 0x20
_FLAGS = struct.Struct("<I4x")  # the kernel reads and writes an int, whatever the command's size says
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def let_change(path: Path) -> None:
    """Let a file or folder be changed that is marked otherwise (chattr(1): +i, +a); not what is in it, nor
    what a link leads to.
    """
    with contextlib.suppress(OSError):
        seen = path.lstat()
        if stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode):
            _let_change(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))


def _let_change(fd: int) -> None:
    """Take the marks from what is open, if the file system has any, and close it."""
    try:
        (flags,) = _FLAGS.unpack_from(fcntl.ioctl(fd, _GET_FLAGS, bytes(8)))
        if flags & _FIXED:
            fcntl.ioctl(fd, _SET_FLAGS, _FLAGS.pack(flags & ~_FIXED))
    except OSError:
        pass  # what cannot be changed then says so
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove what stands somewhere, whatever it is, if anything; its folder is let change, too."""
    let_change(path.parent)
    let_change(path)
    if path.is_dir() and not path.is_symlink():
        _empty(path)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _empty(top: Path) -> None:
    """Remove all that is in a folder, with one folder open at a time however deep it is."""
    here, way = os.open(top, _FOLDER), list[str]()
    try:
        while True:
            _let_change(os.dup(here))
            if below := _remove_files(here):
                here = _step(here, below)
                way.append(below)
            elif way:
                here = _step(here, "..")
                os.rmdir(way.pop(), dir_fd=here)
            else:
                return
    finally:
        os.close(here)


def _step(here: int, name: str) -> int:
    """Go into a folder, out of the one that is open."""
    there = os.open(name, _FOLDER, dir_fd=here)
    os.close(here)
    return there


def _remove_files(here: int) -> str:
    """Remove files from a folder until it has no more, or a folder in it comes first: return that."""
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            if entry.is_file(follow_symlinks=False):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                with contextlib.suppress(OSError):
                    _let_change(os.open(entry.name, flags, dir_fd=here))
            os.unlink(entry.name, dir_fd=here)
    return ""
