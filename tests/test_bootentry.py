"""The firmware's boot entry: against virt-firmware's reader, and in firmware of all kinds."""

from __future__ import annotations

import dataclasses
import struct
import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as some

from mosinit import bootentry, init
from mosinit.bootentry import Entry
from mosinit.host import Failure
from tests.installation import NativeInstaller

ENTRY = Entry(1, 2048, 1048576, "6b29fc40-ca47-1067-b31d-00dd010662da")
ANOTHER = dataclasses.replace(ENTRY, uuid="11111111-2222-3333-4444-555555555555")
# "UEFI QEMU DVD", a device path of one PCI node.
FOREIGN = (
    struct.pack("<IH", 1, 10) + "DVD\0".encode("utf-16-le") + b"\x01\x01\x06\x00\x00\x1f\x7f\xff\x04\x00"
)


def firmware(**variables: bytes) -> NativeInstaller:
    host = NativeInstaller()
    host.variables = dict(variables)
    return host


def order(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}H", *numbers)


def test_another_reader_understands_it() -> None:
    virt = pytest.importorskip("virt.firmware.efi.bootentry")
    read = virt.BootEntry(bootentry.encode(ENTRY))
    assert (read.attr, str(read.title), read.optdata) == (1, "mosinit", None)
    path = virt.devpath.DevicePath()
    disk, file = virt.devpath.DevicePathElem(), virt.devpath.DevicePathElem()
    disk.set_gpt(ENTRY.number, ENTRY.start, ENTRY.size, uuid.UUID(ENTRY.uuid))
    file.set_filepath("\\EFI\\systemd\\systemd-bootx64.efi")
    path.extend([disk, file])
    assert bytes(read.devicepath) == bytes(path)


@given(some.integers(1, 128), some.integers(0, (1 << 64) - 1), some.integers(0, (1 << 64) - 1), some.uuids())
def test_what_is_encoded_is_read(number: int, start: int, size: int, identity: uuid.UUID) -> None:
    entry = Entry(number, start, size, str(identity))
    assert bootentry.parse(bootentry.encode(entry)) == entry


@given(some.binary(max_size=300))
def test_nothing_else_is_ours(data: bytes) -> None:
    assert bootentry.parse(data) is None


@pytest.mark.parametrize("at", [4, 6, 20, 22, 24, 25, 62, 63, 64, 70, -1])
def test_what_is_nearly_ours_is_not(at: int) -> None:
    data = bytearray(bootentry.encode(ENTRY))
    data[at] ^= 1
    assert bootentry.parse(bytes(data)) is None


def test_an_entry_that_somebody_switched_off_is_ours() -> None:
    assert bootentry.parse(b"\0\0\0\0" + bootentry.encode(ENTRY)[4:]) == ENTRY


def test_the_first_of_all() -> None:
    host = firmware(Boot0000=FOREIGN, Boot0001=FOREIGN, BootOrder=order(1, 0))
    assert bootentry.register(host, ENTRY) == "Boot0002"
    assert host.variables["BootOrder"] == order(2, 1, 0)
    assert host.variables["Boot0002"] == bootentry.encode(ENTRY)
    assert host.variables["Boot0000"] == host.variables["Boot0001"] == FOREIGN


def test_firmware_without_any() -> None:
    host = firmware()
    assert bootentry.register(host, ENTRY) == "Boot0000"
    assert host.variables == {"Boot0000": bootentry.encode(ENTRY), "BootOrder": order(0)}


def test_installed_again_and_again_it_is_one() -> None:
    host = firmware(
        Boot0000=FOREIGN, Boot0004=bootentry.encode(ANOTHER), Boot000A=bootentry.encode(ENTRY),
        BootOrder=order(0, 10, 4, 7),
    )  # fmt: skip
    for entry in (ENTRY, ANOTHER, ANOTHER):
        assert bootentry.register(host, entry) == "Boot0004"
        assert host.variables == {
            "Boot0000": FOREIGN, "Boot0004": bootentry.encode(entry), "BootOrder": order(4, 0, 7),
        }  # fmt: skip


def test_what_is_there_already_is_not_written_again() -> None:
    host = firmware()
    bootentry.register(host, ENTRY)
    host.efi_write = None  # type: ignore[assignment,method-assign]
    assert bootentry.register(host, ENTRY) == "Boot0000"


class Forgetful(NativeInstaller):
    """Firmware that takes everything and keeps nothing."""

    def efi_write(self, name: str, guid: str, value: bytes) -> None:
        """Forget it."""


def test_firmware_that_keeps_nothing() -> None:
    with pytest.raises(Failure, match="does not keep Boot0000"):
        bootentry.register(Forgetful(), ENTRY)


@pytest.mark.parametrize(
    "make", [lambda: firmware(BootOrder=b"\0\0\1"), lambda: firmware(Boot0000=FOREIGN, BootOrder=b"\0")]
)
def test_an_order_that_is_none_is_left_alone(make: Callable[[], NativeInstaller]) -> None:
    host = make()
    before = dict(host.variables)
    with pytest.raises(Failure, match="no list of entries"):
        bootentry.register(host, ENTRY)
    assert host.variables == before


def test_names_that_are_no_entries() -> None:
    host = firmware(BootCurrent=order(1), Boot00=FOREIGN, Boot000g=FOREIGN, BootOrder=b"")
    host.names = lambda path: [  # type: ignore[method-assign]
        *(f"{name}-{init.EFI_GLOBAL}" for name in host.variables), f"Boot0000-{init.LOADER_GUID}",
    ]  # fmt: skip
    assert bootentry.register(host, ENTRY) == "Boot0000"
