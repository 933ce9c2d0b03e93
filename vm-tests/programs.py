"""Programs of a few instructions, made here, since no distribution has one this bad."""

from __future__ import annotations

import struct

# linux/x86_64 system calls, and reboot(2)'s magic numbers
WRITE, PAUSE, REBOOT = 1, 34, 169
RESTART = (0xFEE1DEAD, 0x28121969, 0x01234567)


def system_call(number: int, *arguments: int) -> bytes:
    """Encode one system call: mov eax; mov edi, esi, edx; syscall."""
    registers = (b"\xbf", b"\xbe", b"\xba")
    moves = [code + struct.pack("<I", value) for code, value in zip(registers, arguments, strict=False)]
    return b"\xb8" + struct.pack("<I", number) + b"".join(moves) + b"\x0f\x05"


def init_program(text: bytes, then: str) -> bytes:
    """Make a static ELF program that writes `text` and then restarts, hangs, or writes on for ever."""
    base, header = 0x400000, 64 + 56
    calls = {"restart": system_call(REBOOT, *RESTART), "hang": system_call(PAUSE), "flood": b""}
    size = len(system_call(WRITE, 1, 0, 0)) + len(calls[then]) + 2
    code = system_call(WRITE, 1, base + header + size, len(text)) + calls[then]
    code += b"\xeb" + struct.pack("<b", -(len(code) + 2))  # jmp to the beginning
    total = header + size + len(text)
    elf = b"\x7fELF\2\1\1".ljust(16, b"\0")
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + header, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    elf += struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, total, total, 4096)
    return elf + code + text
