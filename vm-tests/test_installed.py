"""Run mode on a real machine: a disk that was installed by hand, its TPM, firmware with Secure Boot."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from installed import (
    FOREIGN,
    SIZES,
    UUIDS,
    Change,
    Installed,
    Row,
    boot_options,
    make_volumes,
    place,
    with_header,
    with_tokens,
)
from programs import init_program
from world import check_closed, check_refused

from mosinit import init, vm
from mosinit.machine import Hardware
from tests import volumes

UNUSED = init.PlatformApproval(1, bytes(256))


# What systemd would make a unit of, if it were asked to import credentials; the bring-up has no ear for it.
CREDENTIAL = "io.systemd.credential:systemd.extra-unit.x.service=[Service]\\nExecStart=/x"


@pytest.mark.cold
def test_an_installed_machine_boots_from_its_own_disk_again_and_again(machine: Installed) -> None:
    for smbios in ((), (CREDENTIAL,)):
        outcome = vm.boot(machine.world.host, machine.options(Hardware(smbios=smbios)))
        assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]
        report = outcome.report
        assert report is not None
        assert (report["result"], report["mode"], report["sequence"]) == ("pivoted", "run", 7)
        assert (report["fenced"], report["watchdog"], report["tpm_epoch"]) == (True, True, 1)
        assert report["uki_id"] == machine.world.bootable.ukis["run"].uki_id
        passed = {check["id"] for check in report["checks"]}  # type: ignore[attr-defined]
        assert passed >= {"TPM-IDENTITY", "TPM-POLICY", "VOLUME-IDENTITY", "VOLUME-KEY", "LAYER-SIGNATURE"}


def test_the_saved_machine_goes_on(machine: Installed, tmp_path: Path) -> None:
    outcome = machine.go_on(tmp_path)
    assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]


def planted(*words: str) -> Change:
    """Have cryptsetup change config's header."""

    def change(machine: Installed, disk: Path) -> None:
        secret = machine.material.secret
        with_header(
            machine, disk, lambda path: machine.world.host.run(["cryptsetup", *words, path], stdin=secret)
        )

    return change


def write(name: str, at: int, data: bytes) -> Change:
    def change(machine: Installed, disk: Path) -> None:
        with disk.open("r+b") as file:
            file.seek(place(machine, name)[0] + at)
            file.write(data)

    return change


def copy_over(source: str, target: str, size: int = 0) -> Change:
    """Write a volume of the machine, or so much of it, over another one of this disk."""

    def change(machine: Installed, disk: Path) -> None:
        with machine.disk.open("rb") as whole, disk.open("r+b") as file:
            whole.seek(place(machine, source)[0])
            file.seek(place(machine, target)[0])
            file.write(whole.read(size or SIZES[source]))

    return change


def sfdisk(*calls: tuple[str, ...]) -> Change:
    def change(machine: Installed, disk: Path) -> None:
        for option, *words in calls:
            machine.world.host.run(["sfdisk", "--quiet", "--no-reread", option, disk, *words])

    return change


def each(*changes: Change) -> Change:
    return lambda machine, disk: [change(machine, disk) for change in changes]


def header(change: Callable[[bytes], bytes]) -> Change:
    """Change config's header as who can write its checksums does."""

    def rewrite(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(change(data[: volumes.BYTES]) + data[volumes.BYTES :])

    return lambda machine, disk: with_header(machine, disk, rewrite)


def null_cipher(data: bytes) -> bytes:
    return volumes.changed(data, lambda d: d["segments"]["0"].update(encryption="cipher_null-ecb"))


def other_second_copy(data: bytes) -> bytes:
    """Give the second copy alone another slot priority, with a checksum that holds."""
    other = volumes.changed(data, lambda d: d["keyslots"]["0"].update(priority=2))
    return data[: volumes.COPY] + other[volumes.COPY :]


def break_primary_gpt(machine: Installed, disk: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(512 + 60)
        file.write(b"broken")


ANOTHER = b"\0\x0b" + bytes(32)  # the name of no key
BAD: dict[str, tuple[str, Change]] = {
    "the disk of another machine": (
        "TPM-IDENTITY", with_tokens(lambda m, t: t._replace(record=m.record(storage_key=ANOTHER))),
    ),
    "a record of another CA": (
        "RECORD-SIGNATURE", with_tokens(lambda m, t: t._replace(record=m.record("manifest-ca"))),
    ),
    "a foreign secret under the same policy": (
        "VOLUME-IDENTITY",
        with_tokens(lambda m, t: t._replace(seal_public=m.foreign.public, seal_private=m.foreign.private)),
    ),
    "another firmware state": (
        "TPM-POLICY", with_tokens(lambda m, t: t._replace(approvals={"ab" * 32: UNUSED})),
    ),
    "a planted token": ("LUKS-TOKEN", planted("token", "add", "--key-description", "x")),
    "damaged integrity": ("LUKS-HEADER", write("config", init.LUKS_DATA + 24, b"\x0a")),
    "damaged config": ("VOLUME-READ", write("config", init.LUKS_DATA + (2 << 20), bytes(40 << 20))),
    "another store": ("VOLUME-KEY", copy_over("state", "store")),
    "a null cipher": ("LUKS-HEADER", header(null_cipher)),
    "two headers that disagree": ("LUKS-HEADER", header(other_second_copy)),
    "two config volumes": ("DISK-PARTITION", sfdisk(("--part-type", "5", init.CONFIG_TYPE))),
    "two partitions with one id": ("DISK-ABSENT", sfdisk(("--part-uuid", "5", UUIDS["store"]))),
    "types of config and store exchanged": (
        "LUKS-HEADER", sfdisk(("--part-type", "2", init.STORE_TYPE), ("--part-type", "3", init.CONFIG_TYPE)),
    ),
    "contents of config and store exchanged": (
        "LUKS-HEADER", each(copy_over("store", "config", SIZES["config"]), copy_over("config", "store")),
    ),
    "store and state exchanged": (
        "VOLUME-KEY",
        sfdisk(
            ("--part-type", "3", init.LINUX_TYPE), ("--part-label", "3", "state"),
            ("--part-type", "5", init.STORE_TYPE), ("--part-label", "5", "machine-store"),
        ),
    ),
    "a damaged primary GPT": ("DISK-ABSENT", break_primary_gpt),
}  # fmt: skip


# Where config was opened by its own secret, and what came then was refused.
OPENED = {"VOLUME-KEY", "VOLUME-READ"}
# What is wrong with the only disk is told where a disk is missing.
TOLD = {
    "two partitions with one id": "vda: GPT-ENTRY: expected partition ids that differ",
    "a damaged primary GPT": "vda: GPT-HEADER: expected checksum ",
}


@pytest.mark.parametrize("case", BAD)
def test_refused(machine: Installed, tmp_path: Path, case: str) -> None:
    check, change = BAD[case]
    outcome = machine.go_on(tmp_path, change)
    if check in OPENED:
        check_refused(outcome, check)
    else:
        assert TOLD.get(case, "") in check_closed(outcome, check)


# --- Config volumes with other content, all made by one run of User Mode Linux


def repack(git: Path) -> None:
    """Pack objects and refs, as whoever works there by hand has git do it."""
    subprocess.run(["git", f"--git-dir={git}", "gc", "--quiet"], check=True)
    assert list((git / "objects/pack").glob("*.pack"))


PLANTED = b"a program in manifest.git runs\n"
GIT_CONFIG = f"""[core]
\trepositoryformatversion = 999
\tworktree = /
\tfsmonitor = {init.MANIFEST_GIT}/hooks/fsmonitor
\thooksPath = {init.MANIFEST_GIT}/hooks
\tsshCommand = {init.MANIFEST_GIT}/hooks/fsmonitor
[extensions]
\tobjectFormat = sha256
[include]
\tpath = {init.MANIFEST_GIT}/more
"""


def plant(git: Path) -> None:
    """Put into manifest.git all that makes a git run programs, or read other objects than those named."""
    (git / "config").write_text(GIT_CONFIG)
    (git / "more").write_text("[gc]\n\tauto = 1\n")
    (git / "hooks").mkdir(exist_ok=True)
    for name in ("fsmonitor", "post-checkout", "reference-transaction", "post-index-change"):
        (git / "hooks" / name).write_bytes(init_program(PLANTED, "hang"))
        (git / "hooks" / name).chmod(0o755)
    (git / "objects/info").mkdir(exist_ok=True)
    (git / "objects/info/alternates").write_text("/atomfs-cache/objects\n")
    main = (git / "refs/heads/main").read_text()
    (git / "refs/replace").mkdir()
    (git / "refs/replace" / main.strip()).write_text("0" * 39 + "1\n")
    (git / "shallow").write_text(main)
    (git / "HEAD").write_text("ref: refs/heads/other\n")


@pytest.fixture(scope="module")
def configs(machine: Installed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Change]:
    """What puts another volume in the place of the machine's config."""
    folder, plain = tmp_path_factory.mktemp("configs"), machine.tokens()
    public, private = machine.foreign
    foreign = plain._replace(seal_public=public, seal_private=private)
    rows, disks = [], []
    for letter, (name, key, tokens, change) in zip("abc", (
        ("packed", machine.material.secret, plain, repack),
        ("hostile", machine.material.secret, plain, plant),
        ("foreign", FOREIGN, foreign, None),
    ), strict=True):  # fmt: skip
        machine.manifest_git(folder / name / "manifest.git")
        if change:
            change(folder / name / "manifest.git")
        disks.append(folder / f"{name}.raw")
        disks[-1].write_bytes(bytes(SIZES["config"]))
        rows.append(Row(f"/dev/ubd{letter}", "config", key, tuple(tokens), str(folder / name)))
    make_volumes(folder, rows, disks)
    return {disk.stem: write("config", 0, disk.read_bytes()) for disk in disks}


@pytest.mark.parametrize(("case", "check"), [("packed", "GIT-PACKED"), ("foreign", "VOLUME-IDENTITY")])
def test_another_config_volume(
    machine: Installed, configs: dict[str, Change], tmp_path: Path, case: str, check: str
) -> None:
    """The foreign one is sealed to this TPM under the same policy, and carries the machine's own record."""
    (check_closed if case == "foreign" else check_refused)(machine.go_on(tmp_path, configs[case]), check)


def test_what_a_git_would_obey_is_not_looked_at(
    machine: Installed, configs: dict[str, Change], tmp_path: Path
) -> None:
    outcome = machine.go_on(tmp_path, configs["hostile"])
    console = outcome.console.read_text(errors="replace")
    assert outcome.status == 0, console[-3000:]
    assert PLANTED.decode().strip() not in console


@pytest.mark.cold
def test_a_live_uki_opens_nothing_of_an_installed_disk(machine: Installed, tmp_path: Path) -> None:
    world = machine.world
    disk = machine.copy_disk(tmp_path)
    machine.put_uki(disk, world.bootable.ukis["live"].path)
    shutil.copytree(machine.state, tmp_path / "state")
    outcome = vm.boot(world.host, boot_options(disk, tmp_path / "state", Hardware()))
    check_refused(outcome, "DISK-PARTITION")
    assert '{"name": "unlock", "ok": true' in outcome.console.read_text(errors="replace")
