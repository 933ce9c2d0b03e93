"""A real TPM in software (swtpm) on a socket, and a machine in memory whose TPM it is."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mosinit import init
from tests.fake import FakeMachine

WAIT_SECONDS = 20
CMD_STOP, CMD_INIT = 0x0E, 0x02  # swtpm_ioctls(3): control channel
TPM2_STARTUP_CLEAR = struct.pack(">HIIH", init.ST_NO_SESSIONS, 12, 0x144, 0)
TRANSIENT, SESSIONS = 0x80000000, 0x02000000  # part 2, 7.2: what is loaded
RH_PLATFORM, CLEAR, CLEAR_CONTROL = 0x4000000C, 0x126, 0x127  # part 2, 7.4 and 6.5.2


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
        return self._connect(self.path)

    def _connect(self, path: Path) -> socket.socket:
        # A socket is there a moment before anybody listens on it.
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(WAIT_SECONDS)
            try:
                client.connect(str(path))
                return client
            except ConnectionRefusedError:
                client.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def reset(self) -> None:
        """Do what a restart of the machine does: PCRs start anew, and TPM2_Startup(CLEAR) is sent."""
        with contextlib.closing(self._connect(self.control)) as control:
            for command in (struct.pack(">I", CMD_STOP), struct.pack(">II", CMD_INIT, 0)):
                control.sendall(command)
                assert control.recv(4) == bytes(4)
        with contextlib.closing(self.connect()) as client:
            client.sendall(TPM2_STARTUP_CLEAR)
            assert client.recv(4096)[6:10] == bytes(4)

    def send(self, command: int, handles: bytes, parameters: bytes) -> None:
        """Do one command that is authorised by an empty password."""
        body = handles + struct.pack(">I", len(init.EMPTY_PASSWORD)) + init.EMPTY_PASSWORD + parameters
        with contextlib.closing(self.connect()) as client:
            client.sendall(struct.pack(">HII", init.ST_SESSIONS, 10 + len(body), command) + body)
            assert client.recv(4096)[6:10] == bytes(4)

    def allow_clear(self) -> None:
        """Do what only the firmware can: switch TPM2_Clear on."""
        self.send(CLEAR_CONTROL, struct.pack(">I", RH_PLATFORM), b"\0")

    def clear(self) -> None:
        """Do what the firmware's setup calls clearing the TPM, and restart."""
        self.reset()
        self.allow_clear()
        self.send(CLEAR, struct.pack(">I", RH_PLATFORM), b"")

    def forget(self) -> None:
        """Drop loaded objects and sessions, as tpm2_flushcontext -t and -l do, but at once."""
        plain, flush = init.ST_NO_SESSIONS, init.Cc.FLUSH_CONTEXT
        with contextlib.closing(self.connect()) as client:
            for first in (TRANSIENT, SESSIONS):
                client.sendall(struct.pack(">HIIIII", plain, 22, init.Cc.GET_CAPABILITY, 1, first, 64))
                for (handle,) in struct.iter_unpack(">I", client.recv(4096)[19:]):
                    client.sendall(struct.pack(">HIII", plain, 14, flush, handle))
                    assert client.recv(4096)[6:10] == bytes(4)

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend the SHA-256 bank of a PCR."""
        self.send(init.Cc.PCR_EXTEND, struct.pack(">I", pcr), struct.pack(">IH", 1, 0x000B) + digest)


class Breaking:
    """A way to a TPM that breaks at one command, before or after the TPM has done it; `tcti` leads through.

    It stays broken: as if the machine or the program had gone at that moment. `bus` is all that passed.
    """

    def __init__(self, tpm: Swtpm, at: int = 1 << 30, *, done: bool = False) -> None:
        self.tpm, self.at, self.done = tpm, at, done
        self.seen: list[int] = []
        self.bus = b""
        self.path = tpm.folder / "breaking.sock"
        self.tcti = f"swtpm:path={self.path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Breaking:
        control = Path(f"{self.path}.ctrl")
        for path in (self.path, control):
            path.unlink(missing_ok=True)
        control.symlink_to(self.tpm.control)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_SECONDS)

    @property
    def broken(self) -> bool:
        """Say whether it came to that command."""
        return len(self.seen) >= self.at

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with contextlib.closing(client), contextlib.closing(self.tpm.connect()) as tpm:
                    while not self.broken and self._relay(client, tpm):
                        pass

    def _relay(self, client: socket.socket, tpm: socket.socket) -> bool:
        command = client.recv(4096)
        if not command:
            return False
        self.seen.append(struct.unpack_from(">I", command, 6)[0])
        if self.broken and not self.done:
            return False
        tpm.sendall(command)
        answer = tpm.recv(4096)
        self.bus += command + answer
        if not self.broken:
            client.sendall(answer)
        return not self.broken


@contextlib.contextmanager
def swtpm(folder: Path) -> Iterator[Swtpm]:
    """Run a new software TPM with its state in `folder`; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    tpm = Swtpm(folder)
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}",
         "--server", f"type=unixio,path={tpm.path}",
         "--ctrl", f"type=unixio,path={tpm.control}", "--flags", "startup-clear"],
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
