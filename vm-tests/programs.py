"""Programs of a few instructions, made here, since no distribution has one this bad."""

from __future__ import annotations

import struct

# linux/x86_64 system calls, and reboot(2)'s magic numbers
READ, WRITE, OPEN, PAUSE, EXIT, REBOOT = 0, 1, 2, 34, 60, 169
RESTART = (0xFEE1DEAD, 0x28121969, 0x01234567)


def system_call(number: int, *arguments: int) -> bytes:
    """Encode one system call: mov eax; mov edi, esi, edx; syscall."""
    registers = (b"\xbf", b"\xbe", b"\xba")
    moves = [code + struct.pack("<I", value) for code, value in zip(registers, arguments, strict=False)]
    return b"\xb8" + struct.pack("<I", number) + b"".join(moves) + b"\x0f\x05"


def init_program(text: bytes, then: str, path: bytes = b"") -> bytes:
    """Make a static ELF program that writes `text` and then restarts, hangs, ends, or writes on for ever.

    Before that it reads the beginning of the file `path`, if one is named, and ignores what comes of it.
    """
    base, header = 0x400000, 64 + 56
    calls = {
        "restart": system_call(REBOOT, *RESTART), "hang": system_call(PAUSE), "end": system_call(EXIT, 0),
        "flood": b"",
    }  # fmt: skip

    def code(place: int) -> bytes:
        words = system_call(WRITE, 1, place, len(text)) + calls[then]
        if path:
            # The kernel has read the page by the time that it finds nowhere to write it.
            words = system_call(OPEN, place + len(text), 0) + system_call(READ, 3, base, 4096) + words
        return words + b"\xeb" + struct.pack("<b", -(len(words) + 2))  # jmp to the beginning

    data = text + path + b"\0"
    place = base + header + len(code(0))
    total = place - base + len(data)
    elf = b"\x7fELF\2\1\1".ljust(16, b"\0")
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + header, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    elf += struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, total, total, 4096)
    return elf + code(place) + data
