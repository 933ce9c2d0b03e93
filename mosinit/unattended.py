"""Provisioning and installing without a person: answers (see `answers`), and a port to whoever enrolls.

The request goes out as one line of JSON, and the organisation's answer is the one line that comes back.
"""

from __future__ import annotations

import json
from pathlib import Path

from mosinit import answers, enrolment, init, install, layout, ports, provision
from mosinit.host import Failure, Host

PORT = Path("/dev/virtio-ports/org.mosinit.exchange")
STATE = enrolment.STATE
ANSWER_BYTES = 4 << 20
ANSWER_SECONDS = 3600.0  # until somebody listens; and then, as they may have to look at the request
NETWORK_SECONDS = 120
WAIT_ONLINE = "/usr/lib/systemd/systemd-networkd-wait-online"


def run(host: install.Installer, path: Path) -> dict[str, object]:
    """Provision this machine and install on its disk; says how it went on the report port, too."""
    try:
        with install.alone(host):
            done = _run(host, path)
    except (Failure, init.Refused, OSError) as error:
        answers.tell({"target": "installed", "error": str(error)[:1000]})
        raise
    answers.tell({"target": "installed", "installed": json.loads(json.dumps(done, default=str))})
    return done


def _run(host: install.Installer, path: Path) -> dict[str, object]:
    given = answers.read_answers(path)
    options = options_of(host, given, path)
    places = path.with_name("places.json")
    found = json.loads(places.read_bytes()) if places.exists() else [str(path)]
    told = {"answers": found, "next": "remove the medium and restart"}
    if done := install.resume(host, options):
        return {**done, **told}
    # All that can be refused is refused before the TPM is touched.
    install.plan(host, options)
    if not (STATE / "seal.json").exists():
        check_port(PORT)
        host.say("provisioning: the request goes out")
        asked = provision.request(host, provision.Options(install.LEFT / "organisation", STATE))
        reply = exchange(PORT, Path(str(asked["request"])).read_bytes())
        (STATE / "answer.json").write_bytes(reply)
        provision.take(host, STATE, STATE / "answer.json")
    return {**install.install_provisioned(host, options), **told}


def check_port(port: Path) -> None:
    """See that somebody can answer, before the TPM is asked for anything. Raises `Failure`."""
    if not port.exists():
        raise Failure(
            f"this machine has no port {port.name} to ask for its enrolment: give the virtual machine that "
            "virtio port, or provision and install by hand"
        )


def options_of(host: Host, given: answers.Answers, path: Path) -> install.Options:
    """Return what to install where, once what that takes is there."""
    source, access = given.source or install.MEDIUM_RELEASE, None
    if source.startswith("docker:"):
        from mosinit import registry

        authority = path.with_name("registry-ca.pem")
        access = registry.open_access(authority if authority.exists() else None, None, 120.0, source, [])
        wait_for_network(host)
    return install.Options(
        given.disk, STATE, source=source, state=given.state, store=given.store, scratch=given.scratch,
        access=access, consent=layout.Consent(given.erase, given.members, serial_is_enough=True),
    )  # fmt: skip


def wait_for_network(host: Host) -> None:
    """Wait until a network is there: this runs as soon as the system is up."""
    try:
        words = ["--any", "--operational-state=routable", f"--timeout={NETWORK_SECONDS}"]
        host.run([WAIT_ONLINE, *words], timeout=NETWORK_SECONDS + 30)
    except Failure as failure:
        raise Failure(
            f"no network after {NETWORK_SECONDS} s, and the release is in a registry: look at cable and "
            f"DHCP ({failure})"
        ) from failure


def exchange(port: Path, request: bytes, seconds: float = ANSWER_SECONDS) -> bytes:
    """Send a request as one line and return the line that comes back. Raises `Failure`."""
    line = json.dumps(json.loads(request)).encode() + b"\n"
    try:
        with ports.opened(port, seconds) as fd:
            ports.send(fd, line, seconds)
            reply = ports.receive(fd, ANSWER_BYTES, seconds)
    except OSError as error:
        why = "" if isinstance(error, TimeoutError) else f" ({error.strerror or error})"
        raise Failure(
            f"nobody takes the request at {port}{why}: connect whoever enrolls machines, then install again"
        ) from error
    if len(reply) > ANSWER_BYTES:
        raise Failure(f"what came from {port} is no answer: it has more than {ANSWER_BYTES} bytes")
    if not reply.endswith(b"\n"):
        raise Failure(f"no answer came from {port}: enroll the machine, then install again")
    return reply
