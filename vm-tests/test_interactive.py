"""A person installs a machine at its serial line, and enrolls it by SSH; then it starts from its disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from driven import SECONDS, Driven, attended
from probed import add_layer
from serial import BACK_TAB, ENTER, TAB, Screen
from world import World, make_tar

from mosinit import disk, enroll, hostfs, init, layout, vm
from mosinit.installer import INTERRUPTED
from mosinit.machine import Hardware

pytestmark = pytest.mark.cold

SSH_SECONDS = 60.0
LOST = b"what somebody forgot on this disk ".ljust(4096, b".")


@dataclass
class Site:
    """A medium that lets a key in, an empty disk, and a port that leads to the machine's SSH."""

    world: World
    folder: Path
    medium: Path
    port: int

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    def head(self) -> bytes:
        """Return the beginning of the disk."""
        with self.disk.open("rb") as file:
            return file.read(len(LOST))

    def command(self, *words: str, key: str = "key") -> list[str | Path]:
        """Return how ssh is called."""
        return [
            "ssh", "-F", "none", "-p", str(self.port), "-i", self.folder / key, "-o", "IdentitiesOnly=yes",
            "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new",
            "-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}", "-o", "ConnectTimeout=30",
            *words,
        ]  # fmt: skip

    async def ssh(self, *words: str, key: str = "key", stdin: bytes = b"") -> tuple[int, bytes, str]:
        """Say something by SSH; return status, output and messages."""
        command = self.command(*words, key=key)
        done = await asyncio.to_thread(
            lambda: subprocess.run(
                command, input=stdin, capture_output=True, timeout=SSH_SECONDS, check=False
            )
        )
        return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def write_key(path: Path) -> bytes:
    """Write a private key of SSH; return the line of the public one."""
    key = ed25519.Ed25519PrivateKey.generate()
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


@pytest.fixture(scope="module")
def site(world: World) -> Site:
    folder = world.folder / "person"
    folder.mkdir()
    write_key(folder / "other")
    image = world.folder / "interactive-hostfs"
    shutil.copytree(hostfs.build(world.host, folder / "debian"), image)
    # `build --installer-keys` has mkosi put the same file there.
    add_layer(image, make_tar({"etc/mosinit/installer_keys": write_key(folder / "key")}))
    medium, release = folder / "medium.raw", world.release("interactive", None)
    disk.live_medium(world.host, world.bootable.ukis["live"].path, release, world.keyset, medium)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Site(world, folder, medium, port)
    made.disk.write_bytes(LOST)
    os.truncate(made.disk, layout.SMALLEST)
    return made


@contextlib.asynccontextmanager
async def live(site: Site) -> AsyncIterator[Driven]:
    """Boot the medium beside the empty disk."""
    hardware = Hardware(network="restricted", ssh=site.port)
    async with attended(site.world, site.folder / "state", hardware, [site.medium, site.disk]) as machine:
        yield machine


async def asked_until_it_listens(site: Site) -> tuple[int, bytes, str]:
    """Ask for the request, again where nobody listens yet: the key is told before."""
    async with asyncio.timeout(SECONDS):
        while True:
            status, out, error = await site.ssh("root@127.0.0.1", "request")
            if "kex_exchange_identification" not in error:
                return status, out, error
            await asyncio.sleep(1)


async def check_ssh(site: Site, machine: Driven) -> None:
    """A key of the image, one command; nobody and nothing else."""
    said = (await machine.says(b"(ED25519)")).decode(errors="replace")
    status, out, error = await asked_until_it_listens(site)
    assert (status, out) == (1, b""), error
    assert "this machine has made no request yet" in error
    listed = site.world.host.run(["ssh-keygen", "-l", "-f", site.folder / "known_hosts"]).decode()
    assert listed.split()[1] in said
    for words in ([], ["sh"], ["cat /etc/shadow"], ["request; id"]):
        status, out, error = await site.ssh("root@127.0.0.1", *words)
        assert (status, out) == (2, b""), (words, error)
    for words in (["-s", "root@127.0.0.1", "sftp"], ["-W", "127.0.0.1:22", "root@127.0.0.1"]):
        status, out, error = await site.ssh(*words)
        assert (status, out) == (255, b""), (words, error)
    # More, and sshd would not listen to this address for a while.
    for key, user in (("other", "root"), ("key", "nobody")):
        status, out, error = await site.ssh(f"{user}@127.0.0.1", "request", key=key)
        assert (status, out) == (255, b"")
        assert "Permission denied (publickey)" in error


async def installs_by_ssh(site: Site) -> None:
    """Whoever comes with a terminal gets the installer, leads through it by keys, and no shell after it."""
    command, pipe = site.command("-tt", "root@127.0.0.1"), asyncio.subprocess.PIPE
    environment = {**os.environ, "TERM": "vt220"}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment
    )
    assert process.stdin and process.stdout
    try:
        for key, words in ((b"", b"This installs a verified system"), (b"\r", b"Where does the release")):
            process.stdin.write(key)
            seen = b""
            async with asyncio.timeout(SECONDS):
                while words not in seen:
                    more = await process.stdout.read(4096)
                    assert more, (words, seen)
                    seen += more
        process.stdin.write(b"\x03")
        async with asyncio.timeout(SECONDS):
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == INTERRUPTED


async def change_the_network(screen: Screen) -> None:
    """Type an address, and go back to DHCP."""
    await screen.shows("This installs a verified system")
    await screen.type(b"n" + ENTER)
    await screen.shows("10.0.2.15/24 (dhcp)")  # a restricted network has no router
    await screen.type(ENTER)
    await screen.shows("Or type it in:")
    await screen.type(TAB + b"10.0.2.77/24" + ENTER + b"10.0.2.2" + ENTER + b"10.0.2.3" + ENTER + ENTER)
    await screen.shows("10.0.2.77/24 (static) via 10.0.2.2")
    await screen.type(ENTER)
    await screen.shows("Or type it in:")
    await screen.type(ENTER)
    await screen.shows("10.0.2.15/24 (dhcp)")
    await screen.type(b"c" + ENTER)


async def choose(screen: Screen) -> None:
    """Go from the first page to the consent, with keys alone."""
    await screen.shows("This installs a verified system")
    await screen.type(ENTER)
    await screen.shows("Where does the release come from?")
    await screen.type(ENTER)
    await screen.shows("Choose the disk")
    await screen.shows("cannot be chosen: is the medium")
    await screen.type(ENTER)
    await screen.shows("ALL OF THIS WILL BE LOST")
    await screen.shows("type the serial of this disk: extra1")


async def enroll_by_hand(site: Site, screen: Screen) -> None:
    """Save the request on the medium, get it by SSH too, and send the answer."""
    await screen.shows("waits to be enrolled")
    await screen.type(ENTER)
    await screen.shows("the medium itself")
    await screen.type(ENTER)
    await screen.shows("saved as mosinit/request-")
    status, request, error = await site.ssh("root@127.0.0.1", "request")
    assert status == 0, error
    asked, answer = site.folder / "request.json", site.folder / "answer.json"
    asked.write_bytes(request)
    told = await asyncio.to_thread(enroll.enroll, site.world.host, asked, site.world.keyset, answer)
    status, out, error = await site.ssh("root@127.0.0.1", "answer", stdin=request)
    assert (status, out) == (1, b""), error
    assert "the answer is no answer of schema 1" in error
    status, out, error = await site.ssh("root@127.0.0.1", "answer", stdin=answer.read_bytes())
    assert (status, out) == (0, b"the answer was taken: the installation goes on\n"), error
    saved = site.world.host.run(
        ["mtype", "-i", f"{site.medium}@@{init.MIB}", f"::mosinit/request-{told['serial']}.json"]
    )
    assert saved == request


async def install(site: Site) -> None:
    """Install the machine as a person does."""
    async with live(site) as machine:
        screen = Screen(machine)
        await check_ssh(site, machine)
        await installs_by_ssh(site)
        await change_the_network(screen)
        await choose(screen)
        await screen.type(b"another" + ENTER + ENTER)
        await screen.shows("'another' is not the serial of this disk: nothing was written")
        assert site.head() == LOST
        await screen.type(BACK_TAB + b"\x7f" * len("another") + b"extra1" + ENTER + ENTER)
        await enroll_by_hand(site, screen)
        await screen.shows("This machine is installed.")


def test_a_person_installs_a_machine(site: Site) -> None:
    asyncio.run(install(site))
    options = vm.BootOptions(site.disk, site.folder / "state", timeout=SECONDS)
    outcome = vm.boot(site.world.host, options)
    assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]
    assert outcome.report is not None
    assert outcome.report["mode"] == "run"
    assert outcome.system["failed_units"] == []
