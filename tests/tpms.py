"""A real TPM in software (swtpm) on a socket, and a machine in memory whose TPM it is."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from mosinit import init
from tests.fake import FakeMachine

WAIT_SECONDS = 20
CMD_STOP, CMD_INIT = 0x0E, 0x02  # swtpm_ioctls(3): control channel
TPM2_STARTUP_CLEAR = struct.pack(">HIIH", init.ST_NO_SESSIONS, 12, 0x144, 0)


class Swtpm:
    """A running swtpm: `socket` for commands; `tcti` is how tpm2-tss finds it, one client at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path, self.control = folder / "tpm.sock", folder / "tpm.sock.ctrl"  # where tpm2-tss looks
        self.tcti = f"swtpm:path={self.path}"

    def environment(self) -> dict[str, str]:
        """Return the environment in which tpm2-tools, tpm2-openssl and systemd talk to this TPM."""
        return {**os.environ, "TPM2TOOLS_TCTI": self.tcti, "TPM2OPENSSL_TCTI": self.tcti}

    def run(self, *command: str | Path, data: bytes | None = None, fails: bool = False) -> bytes:
        """Run a program against this TPM in its folder; `fails` expects that it does."""
        done = subprocess.run(
            [str(word) for word in command], input=data, env=self.environment(), cwd=self.folder,
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, f"{command}: {done.stdout!r} {done.stderr.decode()}"
        return done.stdout

    def connect(self) -> socket.socket:
        """Open a connection for commands; close it before a program is run."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(WAIT_SECONDS)
        client.connect(str(self.path))
        return client

    def reset(self) -> None:
        """Do what a restart of the machine does: PCRs start anew, and TPM2_Startup(CLEAR) is sent."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as control:
            control.settimeout(WAIT_SECONDS)
            control.connect(str(self.control))
            for command in (struct.pack(">I", CMD_STOP), struct.pack(">II", CMD_INIT, 0)):
                control.sendall(command)
                assert control.recv(4) == bytes(4)
        with contextlib.closing(self.connect()) as client:
            client.sendall(TPM2_STARTUP_CLEAR)
            assert client.recv(4096)[6:10] == bytes(4)


@contextlib.contextmanager
def swtpm(folder: Path) -> Iterator[Swtpm]:
    """Run a new software TPM with its state in `folder`; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    tpm = Swtpm(folder)
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}",
         "--server", f"type=unixio,path={tpm.path}", "--ctrl", f"type=unixio,path={tpm.control}",
         "--flags", "startup-clear"],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (tpm.path.exists() and tpm.control.exists()):
            assert process.poll() is None and time.monotonic() < deadline, "swtpm does not start"
            time.sleep(0.01)
        yield tpm
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


class TpmMachine(FakeMachine):
    """A machine in memory with a real TPM: each command goes over the socket; `commands` counts them."""

    def __init__(self, tpm: Swtpm) -> None:
        super().__init__()
        self.swtpm = tpm
        self.commands: list[int] = []

    def tpm(self, command: bytes) -> bytes:
        self.commands.append(struct.unpack_from(">I", command, 6)[0])
        with contextlib.closing(self.swtpm.connect()) as client:
            client.sendall(command)
            return client.recv(4096)

    def random(self, size: int) -> bytes:
        return os.urandom(size)
