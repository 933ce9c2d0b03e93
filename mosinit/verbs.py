"""The verbs of the command line: each a function of plain values that returns a `Result`.

Modules are imported where they are used: `--help` and most verbs do with few of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosinit import explain, init
from mosinit.host import Failure, Host, Usage

if TYPE_CHECKING:
    from mosinit.publish import Published
    from mosinit.registry import Access

DONE, FAILED = 0, 1
MEDIUM = "oci:/atomfs-cache/mosinit"  # the release of the system that runs
STATE = Path("state")  # what `provision` made, where `install` looks for it
REGISTRY = ("tls_ca", "login", "token_host", "timeout")  # what says how a registry is reached
REGISTRY_SECONDS = 120.0


@dataclass(frozen=True)
class Result:
    """What a verb hands back: plain data for `--json`, the same for a person, and the exit status."""

    data: object
    text: str
    status: int = DONE


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
    options |= {"installer_keys": values.installer_keys, "registry_ca": values.registry_ca}
    made = builder.build(host, values.keys, values.out, values.epoch, **options)
    return Result(plain(made), built_text(made))


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
    from mosinit import images, keys
    from mosinit import publish as publisher

    publisher.parse_destination(values.to)
    keyset = keys.open_keyset(host, values.keys)
    sources = [target.source for target in publisher.read_written(values.manifest).targets]
    access = _access(values, values.to, sources)
    cache = images.open_cache(host)
    done = publisher.publish(host, values.manifest, keyset, values.to, access, cache)
    instead = f", in place of {done.replaced}" if done.replaced else ""
    head = f"published sequence {done.sequence} to {values.to}{instead}"
    return Result(plain(done), f"{explain.printable(head)}\n{published_text(done)}")


def provision_machine(host: Host, values: argparse.Namespace) -> Result:
    """Provision this machine's TPM: make a request, or take its answer."""
    if sum(bool(word) for word in (values.organisation, values.answer, values.approvals)) != 1:
        raise Usage(
            "name one thing: --organisation ORG to make a request, --answer FILE to take its answer, or, on "
            "an installed machine, --approvals FILE"
        )
    if not values.organisation:
        _only_with("--organisation", values, "epoch", "event_log", "again", "auths")
    if values.approvals:
        _only_with("--organisation or --answer", values, "dir", "tpm")
        from mosinit import installed

        return outcome(installed.take_approvals(host, values.approvals))
    if not values.dir:
        raise Usage("name by --dir where what is made lies")
    if bool(values.again) != bool(values.auths):
        raise Usage("--again and --auths go together: the consent and the opened recovery record")
    from mosinit import provision
    from mosinit.tpm import DEVICE, split_tcti

    # Wrong words are said before any file is looked for.
    split_tcti(values.tpm or DEVICE)
    if values.answer:
        return outcome(provision.finish(host, values.dir, values.answer, values.tpm or DEVICE))
    options = provision.Options(
        organisation=values.organisation,
        folder=values.dir,
        epoch=values.epoch,
        event_log=values.event_log or provision.EVENT_LOG,
        tcti=values.tpm or DEVICE,
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
    if not values.out:
        _only_with("a REQUEST, --consent or --out", values, "machines")
    keyset = keys.open_keyset(host, values.keys)
    if values.open_recovery and values.out:
        return outcome(enroll.save_recovery(host, values.open_recovery, keyset, values.out, values.machines))
    if values.open_recovery:
        text = exchange.encode_recovery(enroll.open_recovery(values.open_recovery, keyset)).decode()
        return Result(json.loads(text), text.rstrip("\n"))
    if values.consent:
        return outcome(enroll.consent(host, values.consent, keyset, values.out, values.machines))
    places = (values.request, keyset, values.out, values.machines)
    done = enroll.enroll(host, *places, values.epoch, again=values.again)
    return outcome(done, enroll.notes(done, values.again))


def approve_platform(host: Host, values: argparse.Namespace) -> Result:
    """Approve what PCR 7 will be."""
    from mosinit import approve, keys

    if not values.machine:
        _only_with("--machine SERIAL", values, "machines")
    changes = {name: getattr(values, name) for name in ("pk", "kek", "db", "dbx")}
    options = approve.Options(
        logs=values.logs,
        machine=values.machine,
        machines=values.machines,
        changes={name: path for name, path in changes.items() if path},
        epoch=values.epoch,
        reason=values.reason,
    )
    done = approve.approve(host, keys.open_keyset(host, values.keys), values.out, options)
    return outcome(done, approve.notes(done))


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
        names = ("disk", "dir", "erase", "erase_members", "state", "store", "scratch", "plan")
        _without("--answers, which says all", values, *names, *REGISTRY)
        if values.source != MEDIUM:
            raise Usage("SOURCE does not go with --answers, which says all")
    if not values.answers and not values.disk:
        return _install_step_by_step(host, values)
    if values.disk and not values.source.startswith("docker:"):
        _only_with("a SOURCE in a registry, docker://…", values, *REGISTRY)
    from mosinit import install as installing
    from mosinit import layout

    installer = installing.Installer()
    if values.answers:
        from mosinit import unattended

        return outcome(unattended.run(installer, values.answers))
    options = installing.Options(
        values.disk, values.dir or STATE, values.source, state=values.state << 20, store=values.store << 20,
        scratch=values.scratch << 20, access=_access(values, values.source),
        consent=layout.Consent(values.erase, values.erase_members),
    )  # fmt: skip
    if values.plan:
        shown = installing.show_plan(host, options)
        return Result(plain(shown), installing.plan_text(shown))
    return outcome(installing.install(installer, options))


def _install_step_by_step(host: Host, values: argparse.Namespace) -> Result:
    """Lead a person through an installation, on the terminal."""
    _only_with("--disk", values, "erase", "erase_members", "state", "store", "scratch", "plan")
    in_registry = values.source.startswith("docker:")
    if values.source != MEDIUM and not in_registry:
        raise Usage("a SOURCE that is in no registry goes with --disk: the pages take docker://… alone")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Usage(
            "name the disk to install on: --disk /dev/disk/by-id/…, or --answers FILE; to be asked step by "
            "step needs a terminal"
        )
    from mosinit import enrolment, interactive

    given = interactive.Given(
        source=values.source if in_registry else "",
        state=values.dir or (STATE if STATE.exists() else enrolment.STATE),
        tls_ca=values.tls_ca, login=values.login, timeout=values.timeout or REGISTRY_SECONDS,
        token_hosts=values.token_host,
    )  # fmt: skip
    return outcome(interactive.run(host, given))


def _access(values: argparse.Namespace, place: str, others: Sequence[str] = ()) -> Access | None:
    """Return how registries are reached, None if what is read or written lies in none."""
    if not any(each.startswith("docker:") for each in (place, *others)):
        _only_with("a registry, docker://…", values, *REGISTRY)
        return None
    from mosinit import registry

    seconds = values.timeout or REGISTRY_SECONDS
    return registry.open_access(values.tls_ca, values.login, seconds, place, list(others), values.token_host)


def recover_machine(host: Host, values: argparse.Namespace) -> Result:
    """Bring a machine back that no longer opens by itself."""
    # Wrong usage is said first, wherever this is called.
    if values.reseal:
        _without("--reseal, which needs no secret", values, "key")
        _without("--reseal, which is for the TPM as it was provisioned", values, "dir")
        _without("--reseal, which makes nothing anew", values, "anew")
        _without("--reseal, which reads no release", values, "source", *REGISTRY)
        if values.approvals:
            _without("--approvals, with which no event log is written", values, "out")
    else:
        _only_with("--reseal", values, "approvals", "out")
        if not values.key and not values.dir:
            raise Usage(
                "what shows that the disk is yours is missing: --key FILE names the recovery key (from "
                "`mosinit enroll --open-recovery`), --key - has it typed, --dir STATE takes what `mosinit "
                "provision` left; where firmware changed alone, --reseal needs none of them"
            )
        if not (values.source or "").startswith("docker:"):
            _only_with("a SOURCE in a registry, docker://…", values, *REGISTRY)
    from mosinit import damage, recover, recoverykey, resealing

    recoverer = damage.Recoverer()
    if values.reseal:
        options = resealing.Options(values.disk, values.approvals, values.out or Path("event-log"))
        return outcome(resealing.run(recoverer, options, plan=values.plan))
    access = _access(values, values.source or "")
    found = damage.Options(
        values.disk, recoverykey.read(values.key), values.dir, values.source, values.anew, access=access
    )
    if values.plan:
        return outcome(damage.show_plan(recoverer, found))
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
    if values.all and values.event_log:
        raise Usage("--event-log and --against go with a report, or alone")
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

        against, log = (exchange.read_event_log(path)[0] for path in (values.against, values.event_log))
        names = str(values.against), str(values.event_log)
        differences = explain.compare_logs(against, log, names)
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


def built_text(made: Mapping[str, Any]) -> str:
    """Write for a person what `build` made; by what it knows a build again is for programs alone."""
    facts = {
        "medium": f"{made['medium']} ({_mib(made['medium_bytes'])})",
        "release": made["release"],
        "sequence": made["sequence"],
        "epoch": made["epoch"],
        "manifest": f"sha256:{made['manifest_sha256']}",
        "kernel": made["kernel"],
    }
    lines = _lines(facts)
    for mode, path in made["ukis"].items():
        sizes = f"{_mib(made['uki_bytes'][mode])}, initrd {_mib(made['initrd_bytes'][mode])}"
        lines += _lines({f"UKI of {mode} mode": f"{path} ({sizes})"})
        lines += [f"  {line}" for line in _lines({"id": made["uki_ids"][mode]})]
    return "\n".join(lines)


def published_text(made: Published) -> str:
    """Write for a person what was published."""
    facts: dict[str, object] = {
        "sequence": made.sequence,
        "manifest": f"sha256:{made.manifest_sha256}",
        "signature": f"sha256:{made.signature_sha256}",
        "index": made.index_digest,
    }
    return "\n".join(_lines({**facts, **{f"image of {name}": each for name, each in made.targets.items()}}))


def _mib(size: int) -> str:
    return f"{size / init.MIB:.1f} MiB"


def outcome(outcome: object, notes: Sequence[str] = ()) -> Result:
    """Return what a verb handed back as plain data; for a person a line for each fact, below `notes`, and a
    boot report in it written out.
    """
    data = plain(outcome)
    if not isinstance(data, dict):
        return Result(data, str(data))
    report, status = data.get("report"), data.get("status", DONE)
    facts = {name: value for name, value in data.items() if name not in ("report", "status")}
    lines = [*([explain.report_text(report)] if isinstance(report, dict) else [])]
    lines += [*map(explain.printable, notes), *_lines(facts)]
    return Result(data, "\n".join(lines), status if isinstance(status, int) else FAILED)


def _lines(value: object) -> list[str]:
    """Write plain data for a person: what has a name after it, what is more than one thing below it."""
    if isinstance(value, dict) and value:
        return [line for name, item in value.items() for line in _named(explain.printable(name), item)]
    if isinstance(value, list) and value:
        return [line for item in value for line in _item(item)]
    if value is None or isinstance(value, dict | list):
        return ["none"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    return [explain.printable(str(value))]


def _named(name: str, value: object) -> list[str]:
    lines = _lines(value)
    if isinstance(value, dict | list) and value:
        return [f"{name}:", *(f"  {line}" for line in lines)]
    return [f"{name}: {lines[0]}"]


def _item(value: object) -> list[str]:
    first, *rest = _lines(value)
    if not isinstance(value, dict | list):
        return [first]
    return [f"- {first}", *(f"  {line}" for line in rest)]


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
