"""What of a machine's root outlives its boots: the files below /config/state, by their path in the root.

Each boot lays those that `init.KEPT` names into a layer of their own; whatever else a system writes into its
root is gone at the next. They are made when a machine is installed, and nobody else writes them.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from mosinit import init
from mosinit.host import Host

SshKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


def make(host: Host, folder: Path, *, volume: bool) -> None:
    """Make the state of a new machine in the empty `folder`: its id, its SSH host keys.

    `volume` is whether the machine has a volume for /var, which no boot then does without.
    """
    files = {"etc/machine-id": f"{secrets.token_hex(16)}\n".encode(), **make_ssh_keys()}
    if volume:
        files[Path(init.STATE_MARK).name] = b""
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with host.replacing(place, mode=init.KEPT.get(path, 0o444)) as fresh:
            fresh.write_bytes(content)


def make_ssh_keys() -> dict[str, bytes]:
    """Return a new SSH host key of each kind, private and public, by the path where sshd(8) looks for it."""
    keys: dict[str, SshKey] = {
        "ecdsa": ec.generate_private_key(ec.SECP256R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "rsa": rsa.generate_private_key(public_exponent=65537, key_size=3072),
    }
    files = {}
    for kind, key in keys.items():
        path = f"etc/ssh/ssh_host_{kind}_key"
        files[path] = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        files[f"{path}.pub"] = public + b"\n"
    return files
