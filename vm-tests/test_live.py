"""Live mode on a real machine: firmware with Secure Boot, a TPM, the medium, the kernel's own checks."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import init_program
from world import GOOD_HOSTFS, HELLO, Stacker, World, check_refused, flip, part_of, retouch

from mosinit import disk, firmware, init, keys, tools, uki, vm
from mosinit.machine import VARIABLES, Hardware

# --- The disk's content decides: restored machines ---------------------------------------------------


def test_a_good_medium_hands_over(world: World, medium: Path) -> None:
    outcome = world.go_on(medium)
    assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]
    report = outcome.report
    assert report is not None
    assert (report["result"], report["mode"], report["sequence"]) == ("pivoted", "live", 7)
    assert (report["fenced"], report["failed"], report["watchdog"]) == (True, None, True)
    assert report["uki_id"] == world.bootable.ukis["live"].uki_id
    passed = {check["id"] for check in report["checks"]}  # type: ignore[attr-defined]
    never_noted = {"TPM-EXTEND", "TPM-FENCE", "DISK-HINT", "DISK-ABSENT"} | {
        check for check in init.CHECKS if check.startswith(("GPT-", "MODULE-L", "IMAGE-F"))
    }
    assert passed >= {"SB-OFF", "SB-DB", "SB-KEYRING", "STORE-SIGNATURE", "LAYER-SIGNATURE", "HOSTFS-INIT"}
    assert not passed & never_noted
    stages = [stage["name"] for stage in report["stages"]]  # type: ignore[attr-defined]
    assert stages[-1] == "prepare-root"


def test_the_program_of_hostfs_runs(world: World, medium: Path) -> None:
    """It says a word and restarts the machine, which is too early for a started system."""
    release = world.release("restarts", {"sbin/init": init_program(HELLO, "restart")})
    outcome = world.go_on(world.medium(release), until="multi-user")
    assert (outcome.status, outcome.reason) == (1, "the machine restarted before multi-user.target")
    console = outcome.console.read_bytes()
    assert console.index(b"mosinit-report: ") < console.index(HELLO.strip())
    assert outcome.report is not None
    assert outcome.report["result"] == "pivoted"


def bad_content(world: World, release: Path) -> dict[str, Callable[[], Path]]:
    """Return what makes the release of each case."""
    yaml, signature, certificate = (
        init.MANIFEST_MEDIA_TYPE,
        init.SIGNATURE_MEDIA_TYPE,
        init.CERTIFICATE_MEDIA_TYPE,
    )

    def in_base64(pem: bytes) -> bytes:
        # Near the end: within the CA's signature, so that the certificate still parses.
        lines = pem.rstrip().split(b"\n")
        lines[-2] = (b"B" if lines[-2][:1] == b"A" else b"A") + lines[-2][1:]
        return b"\n".join(lines) + b"\n"

    def other_organisation() -> Path:
        other = keys.new(world.host, world.folder / "other-keys", "another")
        return world.release("other-ca", GOOD_HOSTFS, other)

    def sequence(data: bytes) -> bytes:
        assert b"sequence: 7" in data
        return data.replace(b"sequence: 7", b"sequence: 6")

    return {
        "other CA": other_organisation,
        "manifest": lambda: retouch(release, "bad-manifest", yaml, sequence),
        "signature": lambda: retouch(
            release, "bad-signature", signature, lambda data: flip(data, len(data) - 1)
        ),
        "certificate": lambda: retouch(release, "bad-certificate", certificate, in_base64),
        # Publishing looks for an init itself, but not into layers that came with their own verity data.
        "no init": lambda: world.release("no-init", [Stacker({"etc/hostname": b"nothing\n"})]),
    }


@pytest.mark.parametrize(
    ("case", "check"),
    [
        ("other CA", "MANIFEST-CHAIN"),
        ("manifest", "MANIFEST-SIGNATURE"),
        ("signature", "MANIFEST-SIGNATURE"),
        ("certificate", "MANIFEST-CHAIN"),
        ("no init", "HOSTFS-INIT"),
    ],
)
def test_content_sealed_again_is_refused(
    world: World, release: Path, medium: Path, case: str, check: str
) -> None:
    bad = world.medium(bad_content(world, release)[case]())
    check_refused(world.go_on(bad), check)


@pytest.mark.parametrize(
    ("where", "check"),
    [
        ("superblock", "STORE-READ"),
        ("seal", "STORE-SEAL"),
        ("partition table", "DISK-ABSENT"),
    ],
)
def test_one_flipped_bit_of_the_medium_is_refused(
    world: World, medium: Path, where: str, check: str
) -> None:
    raw = medium.read_bytes()
    start = starts(raw)
    offsets = {
        "superblock": start[init.LIVE_STORE_TYPE] + 1024 + 20,
        "seal": start[init.LIVE_SEAL_TYPE] + init.LIVE_SEAL.size + 40,
        "partition table": 1024 + 8,
    }
    bad = world.folder / f"flipped-{where.replace(' ', '-')}.raw"
    bad.write_bytes(flip(raw, offsets[where]))
    check_refused(world.go_on(bad), check)


def test_one_flipped_bit_of_the_manifest_is_refused(world: World) -> None:
    """It is longer than a block: a short one may lie in the very block of the superblock or of a folder."""
    release = world.release("long", [GOOD_HOSTFS, *({f"etc/{n}": b"one more\n"} for n in range(60))])
    raw = world.medium(release).read_bytes()
    whole = part_of(release, init.MANIFEST_MEDIA_TYPE)[: init.BLOCK]
    assert len(whole) == init.BLOCK
    place = raw.index(whole, starts(raw)[init.LIVE_STORE_TYPE])
    assert place % init.BLOCK == 0
    bad = world.folder / "flipped-manifest.raw"
    bad.write_bytes(flip(raw, place + 20))
    check_refused(world.go_on(bad), "STORE-BLOB")


def starts(raw: bytes) -> dict[str, int]:
    """Return where the partitions of a medium begin, by their types."""
    parts = init.parse_gpt(raw[512:1024], raw[1024 : 1024 + 16384], 512, len(raw) // 512)
    return {partition.kind: partition.start for partition in parts}


def resealed(
    world: World, medium: Path, name: str, change: Callable[[init.LiveSeal], init.LiveSeal]
) -> Path:
    """Copy a medium and give it another seal, whole in itself."""
    raw = medium.read_bytes()
    place = raw.index(init.LIVE_SEAL_MAGIC)
    seal = disk.encode_live_seal(change(init.parse_live_seal(raw[place : place + disk.SEAL_BYTES])))
    target = world.folder / f"{name}.raw"
    target.write_bytes(raw[:place] + seal + raw[place + len(seal) :])
    return target


def test_a_store_signed_by_another_key_is_refused(world: World, medium: Path) -> None:
    def sign(seal: init.LiveSeal) -> init.LiveSeal:
        return seal._replace(signature=world.keyset.signer("KEK").sign_pkcs7(seal.root_hash.encode()))

    check_refused(world.go_on(resealed(world, medium, "foreign-key", sign)), "STORE-SIGNATURE")


def test_a_shorter_store_under_the_same_signature_is_refused(world: World, medium: Path) -> None:
    bad = resealed(world, medium, "shorter", lambda seal: seal._replace(data_blocks=seal.data_blocks - 1))
    check_refused(world.go_on(bad), "STORE-READ")


# --- Firmware, TPM or command line decide: cold machines ---------------------------------------------


def enrolled(world: World, options: vm.BootOptions, **changes: object) -> vm.BootOptions:
    """Make the machine's firmware variables before its first boot, other than usual."""
    certificates = firmware.certificates_of_keyset(world.keyset.folder)
    extra = changes.pop("extra_db", None)
    if extra is not None:
        certificates = dataclasses.replace(certificates, db=(*certificates.db, extra))  # type: ignore[arg-type]
    options.folder.mkdir()
    firmware.enroll(world.host, options.folder / VARIABLES, certificates, **changes)  # type: ignore[arg-type]
    return options


def state(world: World, medium: Path, name: str, **hardware: object) -> vm.BootOptions:
    """Return how to boot the good medium on a machine of its own."""
    switches = Hardware(snapshot=True, **hardware)  # type: ignore[arg-type]
    return world.options(medium, folder=world.folder / f"{name}.state", hardware=switches)


@pytest.mark.cold
def test_secure_boot_off(world: World, medium: Path) -> None:
    options = enrolled(world, state(world, medium, "sb-off"), secure_boot=False)
    check_refused(vm.boot(world.host, options), "SB-OFF")


@pytest.mark.cold
def test_a_third_certificate_in_db(world: World, medium: Path) -> None:
    other = world.keyset.certificate("KEK")
    options = enrolled(world, state(world, medium, "sb-db"), extra_db=other)
    check_refused(vm.boot(world.host, options), "SB-DB")


@pytest.mark.cold
def test_a_machine_owner_key_of_shim(world: World, medium: Path) -> None:
    mok = firmware.mok_list(world.keyset.certificate("KEK"))
    options = enrolled(world, state(world, medium, "sb-mok"), variables=(mok,))
    check_refused(vm.boot(world.host, options), "SB-MOK")


@pytest.mark.cold
def test_no_tpm(world: World, medium: Path) -> None:
    outcome = vm.boot(world.host, state(world, medium, "no-tpm", tpm=False))
    check_refused(outcome, "TPM-ABSENT", fenced=False)


@pytest.mark.cold
def test_a_word_appended_by_the_hypervisor(world: World, medium: Path) -> None:
    words = ("io.systemd.stub.kernel-cmdline-extra=LD_PRELOAD=/x",)
    outcome = vm.boot(world.host, state(world, medium, "smbios", smbios=words))
    check_refused(outcome, "CMDLINE")
    assert "LD_PRELOAD=/x" in str(outcome.report)
    assert not re.search("ld.so|cannot be preloaded", outcome.console.read_text(errors="replace"))


@pytest.mark.cold
def test_the_command_says_so_with_its_exit_status(world: World, medium: Path, release: Path) -> None:
    yaml = init.MANIFEST_MEDIA_TYPE
    bad = world.medium(retouch(release, "bad-for-command", yaml, lambda data: flip(data, 5)))
    command = [sys.executable, "-m", "mosinit", "vm", "boot", "--disk", str(bad)]
    command += [
        "--dir",
        str(world.folder / "by-command"),
        "--report",
        str(world.folder / "refused.json"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tools.checkout(), check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["report"] == json.loads((world.folder / "refused.json").read_bytes())
    assert told["report"]["failed"] == "MANIFEST-SIGNATURE"
    assert "MANIFEST-SIGNATURE" in told["reason"]


# --- What leaves the house ---------------------------------------------------------------------------


def test_db_accepts_nothing_but_ukis_anywhere_in_the_build(world: World, medium: Path) -> None:
    db = [world.keyset.certificate_path(role) for role in ("uki", "layer")]
    found = uki.check_signed_binaries(world.host, [world.folder / "out", medium], db)
    assert [binary for binary in found if binary.accepted]
