"""SMBIOS strings of type 11, by which a hypervisor hands over credentials (systemd.system-credentials(7)).

systemd would take every one of them, units and passwords too, so its import is off. Here one name is looked
for. Whoever has the machine's firmware writes these tables: they are bounded, and read strictly.
"""

from __future__ import annotations

import base64
import binascii

END_OF_TABLE, OEM_STRINGS = 127, 11  # SMBIOS reference specification 3.7, 7.45 and 7.12


def oem_strings(table: bytes) -> list[bytes]:
    """Return all strings of type 11 in a table of structures (6.1). Raises `ValueError`."""
    found: list[bytes] = []
    at, kind = 0, -1
    while kind != END_OF_TABLE and at < len(table):
        kind, length = (*table[at : at + 2], 0)[:2]
        end = table.find(b"\0\0", at + length)
        if length < 4 or end < 0:
            raise ValueError(f"the structure at byte {at} is not whole")
        strings = table[at + length : end].split(b"\0") if end > at + length else []
        if kind == OEM_STRINGS:
            if length != 5 or table[at + 4] != len(strings):
                raise ValueError(f"the strings at byte {at} are not as many as they say")
            found += strings
        at = end + 2
    return found


def credential(strings: list[bytes], name: str) -> bytes | None:
    """Return the credential of that name, None if there is none. Raises `ValueError`."""
    found = set()
    for text in strings:
        for kind in ("credential", "credential.binary"):
            head = f"io.systemd.{kind}:{name}=".encode()
            if text.startswith(head):
                value = text[len(head) :]
                found.add(_decode(value) if kind == "credential.binary" else value)
    if len(found) > 1:
        raise ValueError(f"the credential {name} is there {len(found)} times, each time another")
    return found.pop() if found else None


def _decode(value: bytes) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a binary credential is no base64 ({error})") from error
