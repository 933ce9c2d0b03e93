"""The bring-up against a machine in memory: what is refused, and that every way out passes the fence."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable

import pytest

from mosinit import init
from tests.fake import ESP_UUID, UKI_ID, Ended, FakeMachine, answer, gpt, policy_json, signature_list

ENTER, LEAVE = (hashlib.sha256(word).digest() for word in (b"enter-initrd", b"leave-initrd"))


def end(k: FakeMachine) -> str:
    """Run the whole program and return how it left the machine."""
    with pytest.raises(Ended) as ended:
        try:
            init.boot(k)
        except Ended:
            raise
        except BaseException as error:
            init.give_up(k, error)
    return str(ended.value)


def extended(*digests: bytes) -> bytes:
    """Return PCR 11 of the fake machine after these extensions."""
    value = hashlib.sha256(b"stub").digest()
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


def change(path: str, content: bytes) -> Callable[[FakeMachine], None]:
    return lambda k: k.files.update({path: content})


def variable(name: str, guid: str, value: bytes, attributes: int = 6) -> Callable[[FakeMachine], None]:
    return lambda k: k.variables.update({f"{name}-{guid}": (attributes, value)})


def without_tpm(k: FakeMachine) -> None:
    for name in [name for name in k.files if name.startswith(init.TPM_SYSFS)]:
        del k.files[name]
    k.files["/sys/class/tty/console/active"] = b"ttyS0"


HINT = (ESP_UUID + "\0").encode("utf-16-le")
THREE = signature_list(b"uki certificate", b"layer certificate", b"another")
FIRMWARE_FAULTS: list[tuple[str, Callable[[FakeMachine], object]]] = [
    ("SB-OFF", variable("SecureBoot", init.EFI_GLOBAL, b"\0")),
    ("SB-OFF", lambda k: k.variables.pop(f"SecureBoot-{init.EFI_GLOBAL}")),
    ("SB-MODE", variable("SetupMode", init.EFI_GLOBAL, b"\1")),
    ("SB-MODE", variable("AuditMode", init.EFI_GLOBAL, b"\1")),
    ("SB-DB", variable("db", init.EFI_IMAGE_SECURITY, THREE)),
    ("SB-DB", variable("db", init.EFI_IMAGE_SECURITY, signature_list(b"uki certificate"))),
    ("SB-DB", variable("db", init.EFI_IMAGE_SECURITY, THREE[:-3])),
    ("SB-DB", variable("db", init.EFI_IMAGE_SECURITY, b"")),
    ("SB-MOK", variable("MokListRT", init.SHIM_GUID, b"key")),
    ("SB-MOK", variable("MokListTrustedRT", init.SHIM_GUID, b"\1")),
    ("SB-KEYRING", lambda k: k.keyrings[".platform"].append("x: " + "cc" * 20)),
    ("SB-KEYRING", lambda k: k.keyrings[".machine"].append("x: " + "cc" * 20)),
    ("SB-KEYRING", lambda k: k.keyrings.pop(".platform")),
    ("SB-LOCKDOWN", change("/sys/kernel/security/lockdown", b"none [integrity] confidentiality\n")),
    ("TPM-ABSENT", without_tpm),
    ("TPM-ABSENT", change("/sys/class/tpm/tpm0/tpm_version_major", b"1\n")),
    ("TPM-BANK", lambda k: k.pcrs.update({11: bytes(32)})),
    ("TPM-BANK", lambda k: k.pcrs.update({11: b"\xff" * 32})),
    ("CMDLINE", change("/proc/cmdline", b"console=ttyS0 panic=10 -- LD_PRELOAD=/x\n")),
    ("CMDLINE", change("/proc/cmdline", b"console=ttyS0 panic=10\n")),
    ("ESP-EXTRA", change("/.extra/credentials/a.cred", b"x")),
    ("ESP-EXTRA", lambda k: k.pcrs.update({12: b"\1" * 32})),
    ("ESP-EXTRA", lambda k: k.pcrs.update({13: b"\1" * 32})),
    ("DISK-HINT", lambda k: k.variables.pop(f"LoaderDevicePartUUID-{init.LOADER_GUID}")),
    ("DISK-HINT", variable("LoaderDevicePartUUID", init.LOADER_GUID, HINT, attributes=7)),
    ("DISK-HINT", variable("LoaderDevicePartUUID", init.LOADER_GUID, b"\xff\xd8x")),
    ("DISK-ABSENT", lambda k: k.add_disk("vda", bytes(2 * init.MIB))),
    ("DISK-AMBIGUOUS", lambda k: k.add_disk("vdb")),
    ("DISK-PARTITION", lambda k: None),
]


@pytest.mark.parametrize(("check", "spoil"), FIRMWARE_FAULTS)
def test_refused_with_its_id_on_one_screen_behind_the_fence(
    check: str, spoil: Callable[[FakeMachine], object]
) -> None:
    k = FakeMachine()
    spoil(k)
    way = end(k)
    report = k.framed()
    assert (report["result"], report["failed"]) == ("refused", check)
    assert way == "restart"
    if check != "TPM-ABSENT" or init.TPM_SYSFS + "/tpm_version_major" in k.files:
        assert report["fenced"] is True
        assert k.ops[-1] == ("restart",)
    title, remedy = init.CHECKS[check]
    assert check in k.console and title in k.console and remedy in k.console


def test_what_systemd_boot_says_to_shim_is_no_key() -> None:
    k = FakeMachine()
    variable("ShimRetainProtocol", init.SHIM_GUID, b"\1")(k)
    end(k)
    assert k.framed()["failed"] != "SB-MOK"


def test_setup_mode_has_the_boot_loader_show_its_menu_once() -> None:
    k = FakeMachine()
    variable("SecureBoot", init.EFI_GLOBAL, b"\0")(k)
    variable("SetupMode", init.EFI_GLOBAL, b"\1")(k)
    end(k)
    assert k.framed()["failed"] == "SB-MODE"
    asked = k.variables[f"LoaderConfigTimeoutOneShot-{init.LOADER_GUID}"]
    assert asked == (init.EFI_NON_VOLATILE | 6, "60\0".encode("utf-16-le"))


def test_the_good_machine_gets_as_far_as_the_store() -> None:
    k = FakeMachine()
    end(k)
    assert f"LoaderConfigTimeoutOneShot-{init.LOADER_GUID}" not in k.variables
    passed = {str(check["id"]) for check in k.report.checks}
    assert passed >= {check for check, _ in FIRMWARE_FAULTS} - {
        "DISK-HINT",
        "DISK-ABSENT",
        "DISK-PARTITION",
    }
    assert k.pcrs[11] == extended(ENTER, LEAVE)


@pytest.mark.parametrize(
    "method", ["open_consoles", "load_module", "mount", "arm_watchdog", "efi_write", "close"]
)
def test_a_crash_anywhere_passes_the_fence(method: str) -> None:
    k = FakeMachine()
    k.fail(method, RuntimeError("cannot happen"))
    assert end(k) == "restart"
    assert k.pcrs[11] in (extended(LEAVE), extended(ENTER, LEAVE))


def test_the_fence_is_passed_before_the_disk_is_opened_for_its_content() -> None:
    k = FakeMachine()
    end(k)
    fence = max(index for index, op in enumerate(k.ops) if op[0] == "tpm")
    stages = [str(stage["name"]) for stage in k.report.stages]
    assert stages == [
        "set-up", "load-modules", "check-firmware", "measure", "find-disk", "unlock",
        "open-volumes",
    ]  # fmt: skip
    assert not any(op[0] in ("mount", "dm") for op in k.ops[fence:])


def test_a_fence_that_does_not_hold_switches_the_machine_off() -> None:
    k = FakeMachine()
    k.deaf_tpm = True
    assert end(k) == "power_off"
    assert k.framed()["failed"] == "TPM-FENCE"


@pytest.mark.parametrize("answer", [b"", b"\x80\x01", b"\x80\x01\0\0\0\x0a\0\0\x01\x01", b"\xff" * 4096])
def test_a_tpm_that_takes_no_measurement_takes_no_fence_either(answer: bytes) -> None:
    k = FakeMachine()
    k.tpm = lambda command: answer  # type: ignore[method-assign]
    assert end(k) == "power_off"
    assert k.framed()["failed"] == "TPM-FENCE"


@pytest.mark.parametrize(
    ("command", "check"), [(init.Cc.PCR_READ, "TPM-BANK"), (init.Cc.PCR_EXTEND, "TPM-EXTEND")]
)
def test_a_tpm_that_fails_once_is_refused(command: init.Cc, check: str) -> None:
    k = FakeMachine()
    answers = iter([answer(b"", 0x101)])
    working = k.tpm

    def failing(asked: bytes) -> bytes:
        code = struct.unpack_from(">I", asked, 6)[0]
        return (next(answers, b"") if code == command else b"") or working(asked)

    k.tpm = lambda command: failing(command)  # type: ignore[method-assign]
    assert end(k) == "restart"
    assert k.framed()["failed"] == check


def test_a_busy_tpm_is_asked_again() -> None:
    k = FakeMachine()
    answers = iter([struct.pack(">HII", 0x8001, 10, code) for code in init.TPM_RETRY])
    working = k.tpm
    k.tpm = lambda command: next(answers, b"") or working(command)  # type: ignore[method-assign]
    end(k)
    assert k.pcrs[11] == extended(ENTER, LEAVE)


def test_without_sys_nobody_can_tell_that_there_is_no_tpm() -> None:
    k = FakeMachine()
    k.files.clear()
    assert end(k) == "power_off"


def test_a_fault_of_the_screen_still_restarts() -> None:
    k = FakeMachine()
    k.fail("quiet_kernel", RuntimeError("no console"))
    with pytest.raises(Ended, match="restart"):
        init.give_up(k, ValueError("x"))


def test_a_crash_is_told_with_its_place() -> None:
    k = FakeMachine()
    k.files["/etc/mosinit/policy.json"] = b"{}"
    assert end(k) == "restart"
    report = k.framed()
    assert (report["result"], report["failed"]) == ("crashed", None)
    assert "set_up" in str(report["crash"])


def test_the_keys_decide_not_the_words_about_them() -> None:
    many = [f"{number:040x}" for number in range(10)]
    k = FakeMachine()
    k.files["/etc/mosinit/policy.json"] = policy_json(platform=many)
    k.keyrings[".platform"] = [f"x: {ski}" for ski in [*many[:9], "ff" * 20]]
    end(k)
    assert k.framed()["failed"] == "SB-KEYRING"
    k = FakeMachine()
    k.keyrings[".platform"] *= 2
    end(k)
    assert k.framed()["failed"] == "SB-KEYRING"


def test_shim_variables_are_deleted() -> None:
    k = FakeMachine()
    k.variables[f"MokListRT-{init.SHIM_GUID}"] = (7, b"key")
    end(k)
    assert f"MokListRT-{init.SHIM_GUID}" not in k.variables


def test_the_wait_doubles_from_ten_seconds_to_ten_minutes_and_the_flash_is_spared() -> None:
    waits, writes = [], []
    variables: dict[str, tuple[int, bytes]] = {}
    for _ in range(10):
        k = FakeMachine()
        k.variables |= {**variables, f"SecureBoot-{init.EFI_GLOBAL}": (6, b"\0")}
        end(k)
        waits.append(sum(1 for op in k.ops if op == ("sleep", 1)))
        writes.append(sum(1 for op in k.ops if op[0] == "efi_write"))
        variables = {name: value for name, value in k.variables.items() if name.startswith("Mosinit")}
        assert sum(op == ("feed_watchdog",) for op in k.ops) == waits[-1]
    assert waits == [10, 20, 40, 80, 160, 320, 600, 600, 600, 600]
    assert writes == [1] * 7 + [0] * 3
    stored = json.loads(next(iter(variables.values()))[1])
    assert stored == {"id": "SB-OFF", "sequence": None, "uki": UKI_ID, "count": 7}


LEFT = b'{"id": "a", "sequence": 1, "uki": "u", "count": 3}'


@pytest.mark.parametrize(
    "left",
    [
        b"", b"x" * 2000, LEFT + b" " * 1000, b"[1]", b'{"id":1}', LEFT.replace(b"1", b"NaN"),
        LEFT.replace(b"1", b"[]"), LEFT.replace(b"3", b"-3"), LEFT.replace(b"3", b"3.5"),
    ],
)  # fmt: skip
def test_what_anybody_may_have_written_into_the_firmware_counts_nothing(left: bytes) -> None:
    k = FakeMachine()
    k.variables[f"MosinitRefusal-{init.OUR_GUID}"] = (7, left)
    assert init.read_refusal(k) is None


def test_the_screen_shows_no_control_characters() -> None:
    k = FakeMachine()
    k.files["/proc/cmdline"] = CMD = b"\x1b[2Jok\n"
    end(k)
    assert CMD and "\x1b" not in k.console


def test_the_boot_disk_is_waited_for() -> None:
    k = FakeMachine()
    late = k.disks.pop("/dev/vda")
    sleeps = k.sleep

    def plug(seconds: float) -> None:
        sleeps(seconds)
        if k.now > 5:
            k.disks["/dev/vda"] = late

    k.sleep = plug  # type: ignore[method-assign]
    assert init.find_disk(k).name == "vda"
    assert 5 < k.now < init.DISK_SECONDS


def test_what_is_measured_is_logged_as_systemd_does() -> None:
    k = FakeMachine()
    end(k)
    records = [json.loads(line) for line in k.files[init.MEASURE_LOG].split(b"\x1e")[1:]]
    assert [record["content"]["string"] for record in records] == ["enter-initrd", "leave-initrd"]
    for record, digest in zip(records, (ENTER, LEAVE), strict=True):
        assert (record["pcr"], record["content_type"], record["content"]["eventType"]) == (
            11,
            "systemd",
            "phase",
        )
        digests = {item["hashAlg"]: item["digest"] for item in record["digests"]}
        assert set(digests) == {"sha1", "sha256"}
        assert digests["sha256"] == digest.hex()


def test_only_disks_with_the_esp_are_boot_disks() -> None:
    k = FakeMachine()
    k.add_disk("loop0")
    k.add_disk("vdb", gpt([(init.LIVE_STORE_TYPE, ESP_UUID, 2048, 4095)]).ljust(65536 * 512, b"\0"))
    k.add_disk("vdc", gpt([(init.ESP_TYPE, ESP_UUID, 2048, 4095)]).ljust(1 << 19, b"\0"))
    assert init.find_disk(k).name == "vda"


def test_without_a_sha256_bank_nothing_is_sealed_and_people_can_read_why() -> None:
    k = FakeMachine()
    k.banks = ["sha1"]
    assert end(k) == "restart"
    assert k.framed()["failed"] == "TPM-BANK"
    assert ("sleep", 1) in k.ops


def test_a_fence_that_fails_leaves_time_to_read() -> None:
    k = FakeMachine()
    k.deaf_tpm = True
    assert end(k) == "power_off"
    assert sum(op == ("sleep", 1) for op in k.ops) == init.FIRST_WAIT


def test_whatever_the_fence_raises_switches_the_machine_off() -> None:
    k = FakeMachine()
    k.fail("tpm", KeyError("cannot happen"))
    assert end(k) == "power_off"
    assert k.framed()["failed"] == "TPM-FENCE"


def test_a_stored_hint_is_deleted() -> None:
    k = FakeMachine()
    name = f"LoaderDevicePartUUID-{init.LOADER_GUID}"
    k.variables[name] = (7, HINT)
    end(k)
    assert k.framed()["failed"] == "DISK-HINT"
    assert name not in k.variables


def test_a_stored_hint_that_the_firmware_keeps_is_refused_as_well() -> None:
    """Whoever was root can make a variable that nobody deletes."""
    k = FakeMachine()
    k.variables[f"LoaderDevicePartUUID-{init.LOADER_GUID}"] = (0x27, HINT)
    k.fail("efi_write", PermissionError(1, "operation not permitted"))
    end(k)
    assert (k.framed()["result"], k.framed()["failed"]) == ("refused", "DISK-HINT")


def test_a_module_parameter_that_did_not_take_is_refused() -> None:
    k = FakeMachine()
    k.files["/sys/module/dm_verity/parameters/require_signatures"] = b"N\n"
    end(k)
    assert k.framed()["failed"] == "MODULE-PARAMETER"


def test_modules_get_their_parameters_and_disks_are_probed_aside() -> None:
    k = FakeMachine()
    end(k)
    loaded = [op[1:] for op in k.ops if op[0] == "load_module"]
    assert loaded == [("/dm_verity.ko", "require_signatures=Y"), ("/ahci.ko", "async_probe=1")]


def test_a_module_that_does_not_load_is_refused() -> None:
    k = FakeMachine()
    k.fail("load_module", OSError(errno.ENOENT, "no such file"))
    end(k)
    assert k.framed()["failed"] == "MODULE-LOAD"


def test_another_partition_table_than_the_kernels_is_refused() -> None:
    k = FakeMachine()
    disk = gpt(
        [(init.ESP_TYPE, ESP_UUID, 2048, 4095), (init.LIVE_SEAL_TYPE, UKI_ID[:8] + ESP_UUID[8:], 4096, 4127)]
    )
    k.add_disk("vda", disk.ljust(65536 * 512, b"\0"))
    k.files |= {
        "/sys/block/vda/vda2/partition": b"2\n",
        "/sys/block/vda/vda2/start": b"4097\n",
        "/sys/block/vda/vda2/size": b"32\n",
    }
    end(k)
    assert k.framed()["failed"] == "DISK-PARTITION"


def test_the_policy_of_the_initrd_reaches_the_report() -> None:
    k = FakeMachine()
    k.files["/etc/mosinit/policy.json"] = policy_json(epoch=3)
    end(k)
    assert (k.framed()["epoch"], k.framed()["uki_id"], k.framed()["mode"]) == (3, UKI_ID, "live")


def test_what_waits_waits_side_by_side() -> None:
    gate, done = threading.Barrier(init.THREADS), list[int]()

    def work(number: int) -> None:
        gate.wait(30)
        done.append(number)

    init.in_parallel(work, range(3 * init.THREADS))
    assert sorted(done) == list(range(3 * init.THREADS))
    init.in_parallel(work, [])


def test_a_failure_side_by_side_is_raised_once_all_others_are_done() -> None:
    done = list[int]()

    def work(number: int) -> None:
        if number == 0:
            raise OSError(errno.EIO, "input/output error")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(OSError, match="input/output"):
        init.in_parallel(work, range(3 * init.THREADS))
    assert sorted(done) == list(range(1, 3 * init.THREADS))
