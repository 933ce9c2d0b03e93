"""The command line: one table of verbs, each a function that takes plain values and returns plain data.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 refused by a check (its id is shown), 130 interrupted.
Results go to standard output, as text or with `--json` as one JSON value; progress and errors to stderr.
`--help`, `--version` and `explain` need nothing but Python: the other verbs first enter the tools tree.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mosinit import __version__, explain, init, tools
from mosinit.host import Failure, Host, Usage

DONE, FAILED, WRONG_USAGE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class Result:
    """What a verb hands back: plain data for `--json`, the same for a person, and the exit status."""

    data: object
    text: str
    status: int = DONE


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


# --- The verbs' functions ----------------------------------------------------------------------------


def demo(host: Host, values: argparse.Namespace) -> Result:
    """Go from nothing to an installed machine."""
    from mosinit import demo as demonstration

    return outcome(demonstration.demo(host, values.dir, values.interactive))


def test(host: Host, values: argparse.Namespace) -> Result:
    """Run the tests; their output is their own."""
    from mosinit import testing

    return Result(None, "", testing.run(host, values.strength, expression=values.k, cold=values.cold))


def keys_new(host: Host, values: argparse.Namespace) -> Result:
    """Make a keyset."""
    from mosinit import keys

    return _keyset(keys.new(host, values.folder, values.product))


def keys_show(host: Host, values: argparse.Namespace) -> Result:
    """List a keyset."""
    from mosinit import keys

    return _keyset(keys.open_keyset(host, values.folder))


def keys_export(host: Host, values: argparse.Namespace) -> Result:
    """Write a keyset's public parts."""
    from mosinit import keys

    made = keys.export(host, values.folder, values.out)
    return outcome({"organisation": made.folder, "name": made.name, "product": made.product})


def keys_epoch(host: Host, values: argparse.Namespace) -> Result:
    """Raise a keyset's epoch."""
    from mosinit import keys

    return _keyset(keys.raise_epoch(host, values.folder, values.epoch))


def build(host: Host, values: argparse.Namespace) -> Result:
    """Build everything a machine boots from."""
    from mosinit import build as builder

    if values.manifest and values.sequence:
        raise Usage("--sequence goes without --manifest, which names its own")
    options = {"sequence": values.sequence or 1, "manifest": values.manifest, "profile": values.profile}
    options["installer_keys"] = values.installer_keys
    return outcome(builder.build(host, values.keys, values.out, values.epoch, **options))


def run_tool(host: Host, values: argparse.Namespace) -> Result:
    """Run a program of the tools tree; its output is its own."""
    if not values.command:
        raise Usage("name a program and its arguments: mosinit tools run mkosi --version")
    program, *_ = values.command
    if not shutil.which(program):
        raise Failure(
            f"the tools tree has no program {program}: `mosinit tools run ls /usr/bin /usr/sbin` lists "
            "those that it has"
        )
    return Result(None, "", host.call(values.command))


def publish(host: Host, values: argparse.Namespace) -> Result:
    """Sign and publish a manifest."""
    from mosinit import images, keys, registry
    from mosinit import publish as publisher

    publisher.parse_destination(values.to)
    keyset = keys.open_keyset(host, values.keys)
    sources = [target.source for target in publisher.read_written(values.manifest).targets]
    access = registry.open_access(
        values.tls_ca, values.login, values.timeout, values.to, sources, values.token_host
    )
    cache = images.open_cache(host)
    return outcome(publisher.publish(host, values.manifest, keyset, values.to, access, cache))


def provision_machine(host: Host, values: argparse.Namespace) -> Result:
    """Provision this machine's TPM: make a request, or take its answer."""
    if sum(bool(word) for word in (values.organisation, values.answer, values.approvals)) != 1:
        raise Usage(
            "name --organisation ORG to make a request, --answer ANSWER to take its answer, or, on an "
            "installed machine, --approvals FILE"
        )
    if not values.organisation:
        _only_with("--organisation", values, "epoch", "event_log", "again", "auths")
    if values.approvals:
        _only_with("--organisation or --answer", values, "dir")
        from mosinit import installed

        return outcome(installed.take_approvals(host, values.approvals))
    if not values.dir:
        raise Usage("--dir names where what is made lies")
    if bool(values.again) != bool(values.auths):
        raise Usage("--again and --auths go together: the consent and the opened recovery record")
    from mosinit import provision

    if values.answer:
        return outcome(provision.finish(host, values.dir, values.answer, values.tpm))
    options = provision.Options(
        organisation=values.organisation,
        folder=values.dir,
        epoch=values.epoch,
        event_log=values.event_log or provision.EVENT_LOG,
        tcti=values.tpm,
        consent=values.again,
        auths=values.auths,
    )
    return outcome(provision.request(host, options))


def enroll_machine(host: Host, values: argparse.Namespace) -> Result:
    """Answer a machine's request, consent to another, or open a recovery record."""
    from mosinit import enroll, exchange, keys

    if sum(bool(word) for word in (values.request, values.consent, values.open_recovery)) != 1:
        raise Usage("name one thing: a REQUEST, --consent SERIAL or --open-recovery FILE")
    if not values.request:
        _only_with("a REQUEST", values, "again", "epoch")
    if not values.out and not values.open_recovery:
        raise Usage("--out names where answer or consent go")
    keyset = keys.open_keyset(host, values.keys)
    if values.open_recovery and values.out:
        return outcome(enroll.save_recovery(host, values.open_recovery, keyset, values.out, values.machines))
    if values.open_recovery:
        text = exchange.encode_recovery(enroll.open_recovery(values.open_recovery, keyset)).decode()
        return Result(json.loads(text), text.rstrip("\n"))
    if values.consent:
        return outcome(enroll.consent(host, values.consent, keyset, values.out, values.machines))
    places = (values.request, keyset, values.out, values.machines)
    return outcome(enroll.enroll(host, *places, values.epoch, again=values.again))


def approve_platform(host: Host, values: argparse.Namespace) -> Result:
    """Approve what PCR 7 will be."""
    from mosinit import approve, keys

    changes = {name: getattr(values, name) for name in ("pk", "kek", "db", "dbx")}
    options = approve.Options(
        logs=values.logs,
        machine=values.machine,
        machines=values.machines,
        changes={name: path for name, path in changes.items() if path},
        epoch=values.epoch,
        reason=values.reason,
    )
    return outcome(approve.approve(host, keys.open_keyset(host, values.keys), values.out, options))


def uki_sign(host: Host, values: argparse.Namespace) -> Result:
    """Sign a UKI that another tool put together."""
    from mosinit import keys, uki

    keyset = keys.open_keyset(host, values.keys)
    keys.check_out(values.out, keyset.folder)
    return outcome(uki.sign(host, values.unsigned, values.initrd, keyset, values.out))


def vm_boot(host: Host, values: argparse.Namespace) -> Result:
    """Boot a disk image in a VM."""
    from mosinit import demo, vm
    from mosinit.machine import Hardware

    if values.enroll and not values.keys:
        raise Usage("--enroll answers as the organisation: name its keyset by --keys")
    if values.keys and values.setup_mode and not values.enroll:
        raise Usage("--setup-mode trusts nobody at first: --keys goes with it for --enroll alone")
    options = vm.BootOptions(
        disk=values.disk,
        folder=values.dir,
        keys=None if values.setup_mode else values.keys,
        setup_mode=values.setup_mode,
        report=values.report,
        until=values.until,
        timeout=values.timeout or (demo.INSTALL_SECONDS if values.until == "installed" else 300.0),
        interactive=values.interactive,
        hardware=Hardware(extra_disks=tuple(values.extra_disk)),
    )
    if not values.enroll:
        return outcome(vm.boot(host, options))
    with host.scratch() as work:
        exchange = demo.enroller(host, values.keys, work)
        return outcome(vm.boot(host, dataclasses.replace(options, exchange=exchange)))


def install(host: Host, values: argparse.Namespace) -> Result:
    """Install a release on this machine's disk."""
    if values.answers:
        names = ("disk", "erase", "erase_members", "state", "store", "scratch", "plan", "tls_ca", "login")
        _without("--answers, which says all", values, *names, "token_host")
        if values.source != MEDIUM:
            raise Usage("SOURCE does not go with --answers, which says all")
    if not values.answers and not values.disk:
        return _install_step_by_step(host, values)
    from mosinit import install as installing
    from mosinit import layout

    installer = installing.Installer()
    if values.answers:
        from mosinit import unattended

        return outcome(unattended.run(installer, values.answers))
    access = None
    if values.source.startswith("docker:"):
        from mosinit import registry

        access = registry.open_access(
            values.tls_ca, values.login, values.timeout, values.source, [], values.token_host
        )
    options = installing.Options(
        values.disk, values.dir, values.source, state=values.state << 20, store=values.store << 20,
        scratch=values.scratch << 20, access=access,
        consent=layout.Consent(values.erase, values.erase_members),
    )  # fmt: skip
    if values.plan:
        shown = installing.show_plan(host, options)
        return Result(plain(shown), installing.plan_text(shown))
    return outcome(installing.install(installer, options))


def _install_step_by_step(host: Host, values: argparse.Namespace) -> Result:
    """Lead a person through an installation, on the terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Usage(
            "name the disk to install on: --disk /dev/disk/by-id/…, or --answers FILE; to be asked step by "
            "step needs a terminal"
        )
    _only_with("--disk", values, "erase", "erase_members", "state", "store", "scratch", "plan")
    from mosinit import enrolment, interactive

    usual = values.dir == Path("state") and not values.dir.exists()
    given = interactive.Given(
        source=values.source if values.source.startswith("docker:") else "",
        state=enrolment.STATE if usual else values.dir,
        tls_ca=values.tls_ca, login=values.login, timeout=values.timeout, token_hosts=values.token_host,
    )  # fmt: skip
    return outcome(interactive.run(host, given))


def recover_machine(host: Host, values: argparse.Namespace) -> Result:
    """Bring a machine back that no longer opens by itself."""
    # Wrong usage is said first, wherever this is called.
    if values.reseal:
        _without("--reseal, which needs no secret", values, "key", "dir", "source", "anew")
    else:
        _only_with("--reseal", values, "approvals", "out")
    from mosinit import recover, recoverykey, resealing

    recoverer = recover.Recoverer()
    if values.reseal:
        options = resealing.Options(values.disk, values.approvals, values.out or Path("event-log"))
        return outcome(resealing.run(recoverer, options, plan=values.plan))
    access = None
    if values.source and values.source.startswith("docker:"):
        from mosinit import registry

        access = registry.open_access(
            values.tls_ca, values.login, values.timeout, values.source, [], values.token_host
        )
    found = recover.Options(
        values.disk, recoverykey.read(values.key), values.dir, values.source, values.anew, access=access
    )
    if values.plan:
        return outcome(recover.show_plan(recoverer, found))
    return outcome(recover.recover(recoverer, found))


def status(host: Host, values: argparse.Namespace) -> Result:
    """Say what this machine runs."""
    from mosinit import installed

    return outcome(installed.status(host))


def boot_good(host: Host, values: argparse.Namespace) -> Result:
    """Write down that this boot went well."""
    from mosinit import installed

    return outcome(installed.boot_good(host))


def explain_boot(host: Host, values: argparse.Namespace) -> Result:
    """Say what checks mean, or what happened in a boot."""
    if values.what and values.all:
        raise Usage("explain takes one id, such as SB-OFF, a report, or --all")
    if not values.all:
        _only_with("--all", values, "markdown")
    if bool(values.event_log) != bool(values.against):
        raise Usage("--event-log and --against go together: the log of one boot, and that of a good one")
    if values.markdown:
        return Result(explain.explain_all(), explain.markdown_table().rstrip("\n"))
    report = values.what == "-" or (values.what and os.path.exists(values.what))
    if values.all or (values.what and (values.what.upper() in init.CHECKS or not report)):
        if values.event_log:
            raise Usage("--event-log and --against go with a report, or alone")
        checks = explain.explain_all() if values.all else [explain.explain(values.what)]
        return Result(checks if values.all else checks[0], explain.text(checks))
    if not values.what and not values.event_log:
        told = explain.last_boot(host)
        return Result(told, explain.story_text(told))
    differences = None
    if values.event_log:
        from mosinit import exchange

        logs = [exchange.read_event_log(path)[0] for path in (values.against, values.event_log)]
        differences = explain.compare_logs(*logs)
    if not values.what:
        return Result(
            [each._asdict() for each in differences or ()], explain.differences_text(differences or ())
        )
    told = explain.story(explain.read_report(Path(values.what)), differences)
    return Result(told, explain.story_text(told))


def print_schema(host: Host, values: argparse.Namespace) -> Result:
    """Print the schema of manifests."""
    from mosinit import schema

    return Result(None, json.dumps(schema.manifest(), indent=2))


def _only_with(other: str, values: argparse.Namespace, *names: str) -> None:
    """Refuse options that count with another one alone: nobody is to believe that they did."""
    for name in names:
        if getattr(values, name):
            raise Usage(f"--{name.replace('_', '-')} goes with {other}")


def _without(other: str, values: argparse.Namespace, *names: str) -> None:
    """Refuse what does not go with an option."""
    for name in names:
        if getattr(values, name):
            word = name.upper() if name == "source" else f"--{name.replace('_', '-')}"
            raise Usage(f"{word} does not go with {other}")


# --- How results read --------------------------------------------------------------------------------


def _keyset(keyset: Any) -> Result:
    roles = keyset.describe()
    rows = [
        f"{r['role']:<12} {r['algorithm']:<12} until {r['not_after'][:10]}  {r['fingerprint']}"
        for r in roles
    ]
    head = [
        f"keyset {keyset.name}, product {keyset.product}, epoch {keyset.epoch}",
        "fingerprints: SHA-256 of the certificate",
        "",
    ]
    data = {"name": keyset.name, "product": keyset.product, "epoch": keyset.epoch}
    data |= {"folder": str(keyset.folder), "roles": roles}
    return Result(data, "\n".join(head + rows))


def outcome(outcome: object) -> Result:
    """Return what a verb handed back as plain data; a boot report in it is written out for a person."""
    data = plain(outcome)
    if not isinstance(data, dict):
        return Result(data, str(data))
    report, status = data.get("report"), data.get("status", DONE)
    rows = [f"{name}: {_short(value)}" for name, value in data.items() if name not in ("report", "status")]
    if isinstance(report, dict):
        rows.insert(0, explain.report_text(report))
    return Result(data, "\n".join(rows), status if isinstance(status, int) else FAILED)


def _short(value: object) -> str:
    return explain.printable(value) if isinstance(value, str) else json.dumps(value)


def plain(value: object) -> object:
    """Turn records, paths and tuples into what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


# --- The table ---------------------------------------------------------------------------------------


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

    words = f"{help}, 1 to {highest}" + (f" (default: {otherwise})" if otherwise else "")
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


MEDIUM = "oci:/atomfs-cache/mosinit"  # the release of the system that runs
REGISTRY_OPTIONS = (
    folder("--tls-ca", "one more CA that registries may have their certificate from (PEM)", "FILE"),
    folder("--login", "a file with USER:PASSWORD for the registry (default: the variable "
           "MOSINIT_REGISTRY_LOGIN, or what `podman login` keeps)", "FILE"),
    Option("--token-host", "one more server that may see the login: one that makes the registry's tokens",
           {"action": "append", "default": [], "metavar": "HOST[:PORT]"}),
    Option("--timeout", "seconds that a registry may stand still (default: 120)",
           {"type": seconds, "metavar": "S", "default": 120.0}),
)  # fmt: skip

VERBS = (
    Verb(
        "demo",
        "from nothing to an installed machine in a VM, then shows its boot report",
        "mosinit demo --dir ./demo",
        demo,
        (
            folder("--dir", "where everything is made (default: ./demo)", default=Path("demo")),
            flag("--interactive", "end at the console of a demo profile that can log in"),
        ),
        checkout=True,
    ),
    Verb(
        "test",
        "lint, types, unit tests and VM tests; needs a checkout",
        "mosinit test unit -k keys",
        test,
        (
            positional("strength", "only unit tests or only VM tests", nargs="?", choices=("unit", "vm")),
            Option("-k", "only tests whose names match, as pytest understands it", {"metavar": "EXPR"}),
            flag("--cold", "boot every VM from zero instead of restoring saved ones"),
        ),
        json=False,
        checkout=True,
    ),
    Verb(
        "keys new",
        "makes a keyset: every key of an organisation, one role per key",
        "mosinit keys new ./keys --product acme",
        keys_new,
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
        keys_show,
        (positional("folder", "the keyset", type=Path, metavar="DIR"),),
        secrets=True,
    ),
    Verb(
        "keys export",
        "writes the public parts of a keyset to a folder, for the machines to be provisioned",
        "mosinit keys export ./keys --out ./organisation",
        keys_export,
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
        keys_epoch,
        (
            positional("folder", "the keyset", type=Path, metavar="DIR"),
            number("epoch", "the lowest safe epoch; it never falls", init.MAX_EPOCH, None, ""),
        ),
        secrets=True,
    ),
    Verb(
        "build",
        "builds initrd, UKI, hostfs image and live medium; needs a checkout",
        "mosinit build --keys ./keys --out ./out",
        build,
        (
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where the results go", required=True),
            folder("--manifest", "your own install manifest (default: hostfs and bootkit alone)", "FILE"),
            epoch_option("what is below is unsafe", "the keyset's"),
            number("--sequence", "order of the default manifest of the product", init.MAX_SEQUENCE, None),
            Option("--profile", "a profile of mkosi for hostfs: `demo` is root's at the console, for tests",
                   {"metavar": "NAME"}),
            folder("--installer-keys", "who may install by SSH on the live medium: public keys, one a line",
                   "FILE"),
        ),
        checkout=True,
        secrets=True,
    ),
    Verb(
        "tools run",
        "runs a program of the tools tree, such as mkosi, veritysetup or skopeo",
        "mosinit tools run mkosi --directory mkosi.uki --force build",
        run_tool,
        (positional("command", "what to run", nargs=argparse.REMAINDER, metavar="PROGRAM"),),
        json=False,
    ),
    Verb(
        "publish",
        "resolves and signs an install manifest and publishes it with its images",
        "mosinit publish out/manifest.yaml --keys ./keys --to oci:./release",
        publish,
        (
            positional("manifest", "the manifest as a person wrote it", type=Path, metavar="MANIFEST"),
            folder("--keys", "the keyset that signs", required=True),
            Option("--to", "the OCI layout to write, or the tag in a registry",
                   {"required": True, "metavar": "oci:DIR|docker://HOST[:PORT]/NAME:TAG"}),
            *REGISTRY_OPTIONS,
        ),
        secrets=True,
    ),
    Verb(
        "provision",
        "gives this machine's TPM identity, epoch and seal: writes a request, takes answer and approvals",
        "mosinit provision --organisation ./organisation --dir /run/provision",
        provision_machine,
        (
            folder("--dir", "what is made, secrets too: on a live machine a folder in memory, such as one "
                   "below /run", "STATE"),
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
                   {"metavar": "TCTI", "default": "device:/dev/tpmrm0"}),
            folder("--again", "undo an earlier provisioning first: what `mosinit enroll --consent` wrote",
                   "CONSENT"),
            folder("--auths", "with --again: what `mosinit enroll --open-recovery` wrote by --out", "FILE"),
        ),
        secrets=True,
        on_machines=True,
    ),
    Verb(
        "enroll",
        "answers a machine's request: SUDI certificate, machine record, approval of its PCR 7",
        "mosinit enroll request.json --keys ./keys --out answer.json",
        enroll_machine,
        (
            positional("request", "what `mosinit provision` wrote", type=Path, nargs="?", metavar="REQUEST"),
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where answer, consent or recovery record (mode 0600) goes", "FILE"),
            folder("--machines", "where machines and their recovery records are filed (default: "
                   "DIR/machines)", "FOLDER"),
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
        approve_platform,
        (
            positional("logs", "event logs of firmware, or machines' requests (the kernel's copy is "
                       "/sys/kernel/security/tpm0/binary_bios_measurements); for a firmware update, the log "
                       "of a machine of the same model that has it",
                       type=Path, nargs="*", metavar="EVENTLOG"),
            folder("--keys", "the keyset that signs", required=True),
            folder("--out", "where the approvals go", "FILE", required=True),
            Option("--machine", "take the log with which this machine was enrolled; beside an EVENTLOG, say "
                   "what differs from it", {"metavar": "SERIAL"}),
            folder("--machines", "where machines are filed (default: DIR/machines)", "FOLDER"),
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
        uki_sign,
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
        vm_boot,
        (
            folder("--disk", "the disk image", "FILE", required=True),
            folder("--dir", "the machine: firmware variables, TPM, console log", "STATE", required=True),
            folder("--keys", "the keyset to enrol in a new machine's firmware (default: the medium's own)"),
            folder("--report", "also write the report here", "FILE"),
            Option("--until", "how far (default: multi-user)",
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
        install,
        (
            Option("source", "the release: oci:DIR or docker://HOST[:PORT]/NAME:TAG (default: the "
                   "medium's own)",
                   {"nargs": "?", "metavar": "SOURCE", "default": MEDIUM}),
            folder("--disk", "the disk: all of it becomes the machine's", "DEV"),
            folder("--dir", "what `mosinit provision` made (default: ./state)", "STATE",
                   default=Path("state")),
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
        "on the live medium, with the recovery key: the way back into a machine that no longer opens",
        "mosinit recover --key recovery.json --dir /run/provision --plan",
        recover_machine,
        (
            Option("source", "the release that fills the store if it has none that is whole: oci:DIR or "
                   "docker://HOST[:PORT]/NAME:TAG", {"nargs": "?", "metavar": "SOURCE"}),
            folder("--disk", "the machine's disk (default: the only one that is a machine's)", "DEV"),
            Option("--key", "the recovery key: what `mosinit enroll --open-recovery` wrote by --out, a file "
                   "(mode 0600) with the key alone, or - to read it from standard input or the terminal; "
                   "may be repeated", {"action": "append", "default": [], "metavar": "FILE"}),
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
        status,
        tools=False,
    ),
    Verb(
        "boot-good",
        "on an installed machine: this boot went well; keeps it, and lays the release's epoch order",
        "mosinit boot-good",
        boot_good,
        tools=False,
    ),
    Verb(
        "explain",
        "says what a check means, or what happened in a boot, and what to do",
        "mosinit explain SB-OFF",
        explain_boot,
        (
            positional("what", "a check's id, or a file with a boot's report or console log (-: standard "
                       "input); without one: the last boot of this machine", nargs="?", metavar="ID|REPORT"),
            flag("--all", "list every check"),
            flag("--markdown", "write them as the table of the README"),
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
        print_schema,
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


# --- argparse on top ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with one line per error like everything else here."""

    def error(self, message: str) -> NoReturn:
        """Raise `Usage` instead of printing the usage and leaving."""
        raise Usage(f"{message} (see `{self.prog} --help`)")


def parser(table: Sequence[Verb] = VERBS) -> argparse.ArgumentParser:
    """Build the parser from the table."""
    overview = "\n".join(f"  {verb.words:<11} {verb.summary}\n{'':<16}{verb.example}" for verb in table)
    root = Parser(
        prog="mosinit",
        usage="mosinit VERB ...",
        **_words(
            "Brings a Linux machine from power-on to a running, verified root filesystem.",
            f"verbs and examples (in a checkout, `mosinit` is `python3 -m mosinit`):\n{overview}\n\n"
            "`mosinit VERB --help` says more.",
        ),
    )
    root.add_argument("--version", action="version", version=f"mosinit {__version__}")
    verbs = root.add_subparsers(metavar="VERB", help=argparse.SUPPRESS, parser_class=Parser)
    groups: dict[str, Any] = {"": verbs}
    for verb in table:
        group, _, name = verb.words.rpartition(" ")
        if group not in groups:
            groups[group] = _add_group(verbs, group, table)
        _add_verb(groups[group], name, verb)
    return root


def _add_group(verbs: Any, group: str, table: Sequence[Verb]) -> Any:
    lines = "\n".join(f"  {verb.words:<11} {verb.summary}" for verb in _verbs_of(group, table))
    words = _words(GROUPS[group], f"verbs:\n{lines}")
    inner = verbs.add_parser(group, prog=f"mosinit {group}", usage=f"mosinit {group} VERB ...", **words)
    inner.set_defaults(group=group)
    return inner.add_subparsers(metavar="VERB", help=argparse.SUPPRESS, parser_class=Parser)


def _add_verb(verbs: Any, name: str, verb: Verb) -> None:
    words = _words(f"{verb.summary}.", f"example:\n  {verb.example}")
    made = verbs.add_parser(name, prog=f"mosinit {verb.words}", **words)
    for option in verb.options:
        made.add_argument(option.name, help=option.help, **option.more)
    made.set_defaults(verb=verb, json=False)
    if verb.json:
        made.add_argument("--json", action="store_true", help="print the result as JSON")


def _verbs_of(group: str, table: Sequence[Verb]) -> list[Verb]:
    return [verb for verb in table if not group or verb.words.startswith(f"{group} ")]


def _words(description: str, epilog: str) -> dict[str, Any]:
    return {
        "description": description[0].upper() + description[1:],
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        # An abbreviation that works today would be ambiguous or mean something else tomorrow.
        "allow_abbrev": False,
    }


def _parse(words: Sequence[str], table: Sequence[Verb]) -> argparse.Namespace:
    """Parse a command line; the help that a word too many points to is that of its verb."""
    values, rest = parser(table).parse_known_args(words)
    if rest:
        verb = getattr(values, "verb", None)
        where = f"mosinit {verb.words}" if verb else "mosinit"
        raise Usage(f"unrecognized arguments: {' '.join(rest)} (see `{where} --help`)")
    return values


# --- Running a verb ----------------------------------------------------------------------------------


def run(host: Host, values: argparse.Namespace, arguments: list[str]) -> Result:
    """Run the verb; if it needs the tools tree, enter that first, which starts this command again."""
    verb: Verb = values.verb
    if verb.checkout:
        tools.checkout()
    if verb.tools and not (verb.on_machines and tools.on_machine()):
        for name, value in vars(values).items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    tools.check_visible(path, name)
        tools.run_inside(host, arguments)
    if verb.secrets:
        host.hide_memory()
    try:
        return verb.run(host, values)
    except ModuleNotFoundError as error:
        if verb.tools or (error.name or "mosinit").partition(".")[0] == "mosinit":
            raise
        raise Failure(
            f"Python's {error.name} is missing here: run this on a machine that mosinit started, whose "
            "hostfs has it"
        ) from error


def main(arguments: Sequence[str] | None = None, table: Sequence[Verb] = VERBS) -> int:
    """Run the command and return its exit status."""
    host = Host()
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = False
    try:
        if arguments is None:
            # What a verb started (VMs, TPMs, mounts) is stopped by its `finally`: a plain SIGTERM skips
            # those.
            signal.signal(signal.SIGTERM, _terminated)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # So is one by a connection that breaks, unless `nohup` says that it does not matter.
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
                signal.signal(signal.SIGHUP, _terminated)
        values = _parse(words, table)
        as_json = getattr(values, "json", False)
        if not hasattr(values, "verb"):
            names = [verb.words for verb in _verbs_of(getattr(values, "group", ""), table)]
            raise Usage(f"a verb is missing: {', '.join(names)} (see `mosinit --help`)")
        result = run(host, values, words)
        _print(json.dumps(result.data, indent=1) if as_json else result.text)
        return result.status
    except init.Refused as refused:
        return _refused(host, refused, as_json)
    except Failure as failure:
        host.say(f"error: {failure}")
        return failure.status
    except KeyboardInterrupt:
        host.say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output left; a second error when Python flushes at its end would only confuse.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        host.say(f"error: {_os_error(error)}")
        return FAILED


def _os_error(error: OSError) -> str:
    """Name the file that an operation failed on, and what helps."""
    remedies = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EROFS: "name a folder that can be written",
        errno.EACCES: "name another, or change who may use it",
        errno.EPERM: "name another, or change who may use it",
        errno.EEXIST: "name another",
        errno.ENOTDIR: "name another",
        errno.EISDIR: "name a file",
        errno.ENOENT: "name one that exists",
    }
    if error.filename is None or error.errno not in remedies:
        return str(error)
    return f"cannot use {error.filename}: {error.strerror}; {remedies[error.errno]}"


def _refused(host: Host, refused: init.Refused, as_json: bool) -> int:
    """Say what was refused and what to do."""
    refusal = explain.refusal(refused)
    host.say(f"refused: {refusal['failed']}: expected {refusal['expected']}, seen {refusal['seen']}")
    if refusal["remedy"]:
        # A title is about a boot, as the table's remedy is.
        what = "what to do" if explain.advice(refused) else refusal["title"]
        host.say(f"{what}: {refusal['remedy']}")
    if as_json:
        _print(json.dumps(refusal, indent=1))
    return REFUSED


def _print(text: str) -> None:
    if text:
        print(text, flush=True)


def _terminated(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)
