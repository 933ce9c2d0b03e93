"""The table of the command line: what each verb is called, does, takes, and an example of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mosinit import init, verbs
from mosinit.host import Host
from mosinit.verbs import Result


@dataclass(frozen=True)
class Option:
    """One argument of a verb, in argparse's words."""

    name: str
    help: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verb:
    """One verb: its words, what it does, an example that works, and its function."""

    words: str
    summary: str
    example: str
    run: Callable[[Host, argparse.Namespace], Result]
    options: tuple[Option, ...] = ()
    json: bool = True
    tools: bool = True
    checkout: bool = False
    secrets: bool = False  # holds keys or passwords
    on_machines: bool = False  # where mosinit started the system, hostfs has all that it takes


def positional(name: str, help: str, **more: Any) -> Option:
    """Describe an argument that has a place instead of a name."""
    return Option(name, help, more)


def folder(name: str, help: str, metavar: str = "DIR", **more: Any) -> Option:
    """Describe an option that takes a path."""
    return Option(name, help, {"type": Path, "metavar": metavar, **more})


def number(name: str, help: str, highest: int, default: int | None = 1, otherwise: str = "1") -> Option:
    """Describe an option that takes a number from 1 on; without it, `otherwise` says what holds."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"a whole number from 1 to {highest} is expected, not {text!r}")
        return int(text)

    words = f"{help} (1 to {highest}{f'; default: {otherwise}' if otherwise else ''})"
    return Option(name, words, {"type": read, "default": default, "metavar": "N"})


def epoch_option(help: str, otherwise: str) -> Option:
    """Describe --epoch: by default the organisation's lowest safe one."""
    return number("--epoch", help, init.MAX_EPOCH, None, otherwise)


def flag(name: str, help: str) -> Option:
    """Describe an option without a value."""
    return Option(name, help, {"action": "store_true"})


def seconds(words: str) -> float:
    """Read a time to wait: up to a day."""
    try:
        value = float(words)
    except ValueError:
        value = math.nan
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{words[:40]!r} is no number of seconds, at most 86400")
    return value


def mebibytes(name: str, help: str) -> Option:
    """Describe an option that takes a volume's size; 0 is what is usual."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of MiB")
        return int(text)

    return Option(name, f"MiB {help}", {"type": read, "default": 0, "metavar": "MIB"})


REGISTRY_OPTIONS = (
    folder("--tls-ca", "one more CA that registries may have their certificate from (PEM)", "FILE"),
    folder("--login", "a file with USER:PASSWORD for the registry (default: the variable "
           "MOSINIT_REGISTRY_LOGIN, or what `podman login` keeps)", "FILE"),
    Option("--token-host", "one more server that may see the login: one that makes the registry's tokens; "
           "may be repeated",
           {"action": "append", "default": [], "metavar": "HOST[:PORT]"}),
    Option("--timeout", "seconds that a registry may stand still (default: 120)",
           {"type": seconds, "metavar": "S"}),
)  # fmt: skip

VERBS = (
    Verb(
        "demo",
        "from nothing to an installed machine in a VM, then shows its boot report",
        "mosinit demo --dir ./demo",
        verbs.demo,
        (
            folder("--dir", "where everything is made (default: ./demo)", default=Path("demo")),
            flag("--interactive", "end at the console of a hostfs on which root can log in"),
        ),
        checkout=True,
    ),
    Verb(
        "test",
        "lint, types, unit tests and VM tests; needs a checkout",
        "mosinit test unit -k keys",
        verbs.test,
        (
            positional("strength", "only unit tests or only VM tests", nargs="?", choices=("unit", "vm")),
            Option("-k", "only tests whose names match, as pytest understands it", {"metavar": "EXPR"}),
            flag("--cold", "boot every VM from power-on instead of restoring saved ones"),
        ),
        json=False,
        checkout=True,
    ),
    Verb(
        "keys new",
        "makes a keyset: every key of an organisation, one role per key",
        "mosinit keys new ./keys --product acme",
        verbs.keys_new,
        (
            positional("folder", "the folder to make", type=Path, metavar="DIR"),
            Option("--product", "name of the product", {"required": True, "metavar": "NAME"}),
        ),
        secrets=True,
    ),
    Verb(
        "keys show",
        "lists a keyset's roles with fingerprints and validity",
        "mosinit keys show ./keys",
        verbs.keys_show,
        (positional("folder", "the keyset", type=Path, metavar="DIR"),),
        secrets=True,
    ),
    Verb(
        "keys export",
        "writes the public parts of a keyset to a folder, for the machines to be provisioned",
        "mosinit keys export ./keys --out ./organisation",
        verbs.keys_export,
        (
            positional("folder", "the keyset", type=Path, metavar="DIR"),
            folder("--out", "the folder to make", "ORG", required=True),
        ),
        secrets=True,
    ),
    Verb(
        "keys epoch",
        "calls everything below an epoch unsafe: from here nothing is made or enrolled for it",
        "mosinit keys epoch ./keys 2",
        verbs.keys_epoch,
        (
            positional("folder", "the keyset", type=Path, metavar="DIR"),
            number("epoch", "the lowest safe epoch, which never falls", init.MAX_EPOCH, None, ""),
        ),
        secrets=True,
    ),
    Verb(
        "build",
        "builds initrds, UKIs, hostfs image, release and live medium; needs a checkout",
        "mosinit build --keys ./keys --out ./out",
        verbs.build,
        (
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where the results go", required=True),
            folder("--manifest", "your own install manifest (default: hostfs and bootkit alone)", "FILE"),
            epoch_option("of UKIs and release: what is below is unsafe", "the keyset's"),
            number("--sequence", "the sequence of the default manifest", init.MAX_SEQUENCE, None),
            Option("--profile", "a profile of mkosi for hostfs; `demo`, for tests, has root at the console",
                   {"metavar": "NAME"}),
            folder("--installer-keys", "who may install by SSH on the live medium: public keys, one a line",
                   "FILE"),
            folder("--registry-ca", "one more CA that registries may have their certificate from, for who "
                   "installs with the live medium (PEM)", "FILE"),
        ),
        checkout=True,
        secrets=True,
    ),
    Verb(
        "tools run",
        "runs a program of the tools tree, such as mkosi, veritysetup or skopeo",
        "mosinit tools run mkosi --directory mkosi.uki --force build",
        verbs.run_tool,
        (positional("command", "the program and its arguments", nargs=argparse.REMAINDER,
                    metavar="PROGRAM"),),
        json=False,
    ),
    Verb(
        "publish",
        "resolves and signs an install manifest and publishes it with its images",
        "mosinit publish out/manifest.yaml --keys ./keys --to oci:./release",
        verbs.publish,
        (
            positional("manifest", "the manifest as a person wrote it", type=Path, metavar="MANIFEST"),
            folder("--keys", "the keyset that signs", required=True),
            Option("--to", "the folder of an OCI layout: new, empty, or with an earlier release, of a lower "
                   "sequence, whose place is taken; or a tag in a registry, which is moved",
                   {"required": True, "metavar": "oci:DIR|docker://HOST[:PORT]/NAME:TAG"}),
            *REGISTRY_OPTIONS,
        ),
        secrets=True,
    ),
    Verb(
        "provision",
        "gives this machine's TPM identity, epoch and seal: writes a request, takes answer and approvals",
        "mosinit provision --organisation ./organisation --dir /run/provision",
        verbs.provision_machine,
        (
            folder("--dir", "where what is made goes, secrets too: on a live machine a folder in memory, "
                   "such as one below /run", "STATE"),
            folder("--organisation", "make a request to the organisation whose public parts `mosinit keys "
                   "export` wrote there", "ORG"),
            folder("--answer", "take what `mosinit enroll` answered; then the TPM is closed", "FILE"),
            folder("--approvals", "on an installed machine: take what `mosinit approve` wrote, before "
                   "firmware, db or dbx change", "FILE"),
            epoch_option("the machine's epoch", "the organisation's"),
            folder("--event-log", "the firmware's event log (default: the kernel's copy, "
                   "/sys/kernel/security/tpm0/binary_bios_measurements)", "FILE"),
            Option("--tpm", "the TPM: device:FILE, or swtpm:path=SOCKET for a swtpm whose control socket is "
                   "SOCKET.ctrl (default: device:/dev/tpmrm0)",
                   {"metavar": "TCTI"}),
            folder("--again", "with --auths: undo an earlier provisioning first; what `mosinit enroll "
                   "--consent` wrote", "CONSENT"),
            folder("--auths", "with --again: what `mosinit enroll --open-recovery` wrote by --out", "FILE"),
        ),
        secrets=True,
        on_machines=True,
    ),
    Verb(
        "enroll",
        "answers a machine's request: SUDI certificate, machine record, approval of its PCR 7",
        "mosinit enroll request.json --keys ./keys --out answer.json",
        verbs.enroll_machine,
        (
            positional("request", "what `mosinit provision` wrote", type=Path, nargs="?", metavar="REQUEST"),
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where answer, consent or recovery record (mode 0600) goes", "FILE"),
            folder("--machines", "where machines and their recovery records are filed (default: `machines` "
                   "in the keyset)", "FOLDER"),
            epoch_option("the epoch that the request must name", "the keyset's"),
            Option("--again", "the request may take the place of this machine, which is filed already",
                   {"metavar": "SERIAL"}),
            Option("--consent", "sign that this machine may be provisioned again", {"metavar": "SERIAL"}),
            folder("--open-recovery", "show a recovery record (passwords, recovery key), or write it to "
                   "--out", "FILE"),
        ),
        secrets=True,
    ),
    Verb(
        "approve",
        "approves the next PCR 7 of machines in advance: a new db or dbx, a firmware update",
        "mosinit approve --machine 0123456789abcdef --dbx dbx.auth --keys ./keys --out approvals.json",
        verbs.approve_platform,
        (
            positional("logs", "event logs of firmware, or machines' requests (the kernel's copy is "
                       "/sys/kernel/security/tpm0/binary_bios_measurements); for a firmware update, the log "
                       "of a machine of the same model that has it",
                       type=Path, nargs="*", metavar="EVENTLOG"),
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where the approvals go", "FILE", required=True),
            Option("--machine", "take the log with which this machine was enrolled; beside an EVENTLOG, say "
                   "what differs from it", {"metavar": "SERIAL"}),
            folder("--machines", "with --machine: where machines are filed (default: `machines` in the "
                   "keyset)", "FOLDER"),
            folder("--dbx", "dbx will be this: signature lists that are all of it, or a signed update",
                   "FILE"),
            folder("--db", "db will be this", "FILE"),
            folder("--kek", "KEK will be this", "FILE"),
            folder("--pk", "PK will be this", "FILE"),
            epoch_option("the last epoch in which they hold", "the keyset's"),
            Option("--reason", "what it is for, in words", {"metavar": "TEXT"}),
        ),
        secrets=True,
    ),
    Verb(
        "uki sign",
        "signs a UKI that mkosi or ukify made of our initrd, its kernel and its command line",
        "mosinit uki sign out/mkosi/mosinit.efi --initrd out/live.cpio.zst --keys ./keys --out mosinit.efi",
        verbs.uki_sign,
        (
            positional("unsigned", "the UKI, without a signature", type=Path, metavar="UKI"),
            folder("--initrd", "the initrd that `mosinit build` left", "FILE", required=True),
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where the signed UKI goes", "FILE", required=True),
        ),
        secrets=True,
    ),
    Verb(
        "vm boot",
        "boots a disk image under Secure Boot with a software TPM and returns the machine's report",
        "mosinit vm boot --disk out/live.raw --dir ./vm --report report.json",
        verbs.vm_boot,
        (
            folder("--disk", "the disk image", "FILE", required=True),
            folder("--dir", "the machine: firmware variables, TPM, console log", "STATE", required=True),
            folder("--keys", "the keyset to enrol in a new machine's firmware (default: the medium's own)"),
            folder("--report", "also write the report here", "FILE"),
            Option("--until", "how far the boot is to get (default: multi-user)",
                   {"choices": ("pivoted", "multi-user", "installed"), "default": "multi-user"}),
            Option("--timeout", "seconds that the boot may take (default: 300, an installation 1800)",
                   {"type": seconds, "metavar": "S"}),
            flag("--interactive", "this terminal becomes the machine's console"),
            Option("--extra-disk", "one more disk (virtio-extra1, virtio-extra2 … in /dev/disk/by-id); may "
                   "be repeated", {"type": Path, "metavar": "FILE", "action": "append", "default": []}),
            flag("--enroll", "enroll the machine by --keys when it asks for it"),
            flag("--setup-mode", "a new machine trusts nobody; keys are enrolled in the medium's menu, "
                 "with --interactive by you"),
        ),
    ),
    Verb(
        "install",
        "on a live machine: installs a release on its disk; without --disk it asks, step by step",
        "mosinit install --disk /dev/disk/by-id/nvme-disk --dir /run/provision --plan",
        verbs.install,
        (
            Option("source", "the release: oci:DIR or docker://HOST[:PORT]/NAME:TAG (default: the "
                   "medium's own)",
                   {"nargs": "?", "metavar": "SOURCE", "default": verbs.MEDIUM}),
            folder("--disk", "the disk: all of it becomes the machine's", "DEV"),
            folder("--dir", "what `mosinit provision` made (default: ./state)", "STATE"),
            Option("--erase", "what --plan shows for this disk: all that is on it may then be lost",
                   {"metavar": "WORD"}),
            flag("--erase-members", "also what is encrypted on it, or belongs to a RAID, LVM or ZFS"),
            mebibytes("--state", "of a volume that keeps /var (default: what the release demands; "
                      "without one, /var is new at each boot)"),
            mebibytes("--store", "of the volume for releases (default: half of the disk)"),
            mebibytes("--scratch", "of the volume for what is lost at each boot (default: a quarter)"),
            flag("--plan", "only show what would be done"),
            folder("--answers", "provision and install without a person, as this file says", "FILE"),
            *REGISTRY_OPTIONS,
        ),
        tools=False,
        secrets=True,
    ),
    Verb(
        "recover",
        "on the live medium: the way back into a machine that no longer opens",
        "mosinit recover --key recovery.json --dir /run/provision --plan",
        verbs.recover_machine,
        (
            Option("source", "the release that fills the store if it has none that is whole: oci:DIR or "
                   "docker://HOST[:PORT]/NAME:TAG", {"nargs": "?", "metavar": "SOURCE"}),
            folder("--disk", "the machine's disk (default: the only one that is a machine's)", "DEV"),
            Option("--key", "the recovery key, needed unless --dir opens the disk already: what `mosinit "
                   "enroll --open-recovery` wrote by --out, a file (mode 0600) with the key alone, or - to "
                   "read it from standard input or the terminal; may be repeated",
                   {"action": "append", "default": [], "metavar": "FILE"}),
            folder("--dir", "a new board, or a TPM that was cleared: what `mosinit provision` made since",
                   "STATE"),
            flag("--anew", "config or store may be made anew if nothing of it can be used"),
            flag("--plan", "only look, and say what would be done"),
            flag("--reseal", "firmware changed without approval: lays one into the disk's header, without a "
                 "key"),
            folder("--approvals", "with --reseal: what `mosinit approve` wrote; without it, the event log "
                   "that it takes is written", "FILE"),
            folder("--out", "with --reseal: where the event log goes (default: ./event-log)", "FILE"),
            *REGISTRY_OPTIONS,
        ),
        tools=False,
        secrets=True,
    ),
    Verb(
        "status",
        "on a machine: what runs, from where, and how its TPM is",
        "mosinit status --json",
        verbs.status,
        tools=False,
    ),
    Verb(
        "boot-good",
        "on an installed machine: this boot went well; keeps it, and lays the release's epoch order",
        "mosinit boot-good",
        verbs.boot_good,
        tools=False,
    ),
    Verb(
        "explain",
        "says what a check means, or what happened in a boot, and what to do",
        "mosinit explain SB-OFF",
        verbs.explain_boot,
        (
            positional("what", "a check's id, or a file with a boot's report or console log (-: standard "
                       "input); without one: the last boot of this machine", nargs="?", metavar="ID|REPORT"),
            flag("--all", "list every check"),
            flag("--markdown", "with --all: write them as the table of the README"),
            folder("--event-log", "the firmware's event log of that boot, or a request: what of PCR 7 "
                   "differs is named", "FILE"),
            folder("--against", "the event log of a good boot, such as EFI/mosinit/eventlog.bin of a disk's "
                   "boot partition", "FILE"),
        ),
        tools=False,
    ),
    Verb(
        "schema",
        "prints the JSON schema of manifests, for editors",
        "mosinit schema",
        verbs.print_schema,
        json=False,
        tools=False,
    ),
)  # fmt: skip

GROUPS = {
    "keys": "keysets",
    "uki": "kernel images that other tools made",
    "tools": "runs programs of the tools tree",
    "vm": "virtual machines",
}
