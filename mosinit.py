#!/usr/bin/python3 -SIB
"""mosinit - bring a machine from its signed initrd to hostfs.

Runs as PID 1. In order: mount the pseudo file systems, load the modules that the build listed, check the firmware,
measure, find the boot disk, close the fence, verify the manifest, set up the verity layers, stack hostfs, hand over.
Each step fails closed, and there is one way out: `main` fences, says on one screen what was refused and what to do,
and restarts the machine.

One file: standard library, cryptography, yaml; the last two are imported only where they are used. Every line here is
in the signed initrd: a change is a new UKI. Words: `untrusted_*` is a byte string from disk that nobody vouched for.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NewType, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    from cryptography import x509

# --- Errors: what is refused, and the table of everything that can be ------------------------------------------------


class Refused(Exception):
    """A check that failed: people see its title and remedy, not a traceback."""

    def __init__(self, check: str, *, expected: str, seen: str) -> None:
        super().__init__(f"{check}: expected {expected}, seen {seen}")
        self.check, self.expected, self.seen = check, expected, seen


class FenceError(Exception):
    """The TPM did not take the fence: nothing may run on this machine until it is powered off."""


class Check(NamedTuple):
    """One decision of the bring-up. Ids are a public interface and are never reused."""

    title: str
    remedy: str

# --- Kernel: the only code here that touches the world ---------------------------------------------------------------

Pcr = NewType("Pcr", int)


class MountFlag(enum.IntFlag):
    """Flags of mount(2), linux/mount.h."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    NOSYMFOLLOW = 256
    BIND = 4096
    MOVE = 8192
    REC = 16384
    PRIVATE = 1 << 18
    SLAVE = 1 << 19


SAFE = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
RO_SAFE = MountFlag.RDONLY | SAFE


def os_error(what: str, name: str) -> OSError:
    """Make the OSError of the libc call that just failed, naming what was attempted."""
    code = ctypes.get_errno()
    return OSError(code, f"cannot {what} {name}: {os.strerror(code)}")


class Kernel:
    """Mounts, ioctls, files, the clock and restart. Each method is thin and holds no policy."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def mount(self, source: str, target: str, fstype: str, flags: MountFlag = RO_SAFE, data: str = "") -> None:
        """Mount; read-only, nosuid, nodev and noexec unless the caller writes what it relaxes."""
        arguments = (source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode())
        if self._libc.mount(*arguments) < 0:
            raise os_error("mount", target)

    def unmount(self, target: str, *, lazy: bool = False) -> None:
        """Unmount; `lazy` (MNT_DETACH) takes it out of the tree now and ends it when its last user does."""
        if self._libc.umount2(target.encode(), 2 if lazy else 0) < 0:
            raise os_error("unmount", target)
