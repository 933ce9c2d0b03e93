"""hostfs's cache and its inputs, with a recorded mkosi; the real one runs in vm-tests."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from mosinit import hostfs, registry, tools
from mosinit.host import Failure
from tests.recorder import Recorder, Started

ROOT = tools.checkout()


class RecordedMkosi(Recorder):
    """A host whose mkosi writes a small result and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.builds: list[list[str]] = []
        self.sources: dict[str, str] = {}
        self.distribution = "debian"
        self.fails = False
        self.kernels: tuple[str, ...] = ("6.12.0-test",)

    def answer(self, program: Started) -> bytes:
        words = program.words
        assert words[0] == "mkosi"
        source = Path(words[words.index("--directory") + 1])
        if words[-1] == "summary":
            summary = {"Distribution": self.distribution, "Release": "trixie"}
            return json.dumps({"Images": [{"Distribution": "other"}, summary]}).encode()
        self.builds.append(words)
        self.sources = {
            str(path.relative_to(source)): path.read_text(errors="replace")
            for path in source.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        output = Path(words[words.index("--output-directory") + 1])
        (output / "hostfs").mkdir()
        (output / "hostfs/index.json").write_text("demo" if "demo" in words else "{}")
        if self.fails:
            raise Failure("mkosi failed with status 1: no network")
        for version in self.kernels:
            (output / "bootkit/usr/lib/modules" / version).mkdir(parents=True)
            (output / "bootkit/usr/lib/modules" / version / "vmlinuz").write_text("kernel")
        return b""


@pytest.fixture
def mkosi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedMkosi:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return RecordedMkosi()


def test_a_second_build_is_the_first_one(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    first = hostfs.build(mkosi, tmp_path / "one")
    second = hostfs.build(mkosi, tmp_path / "two")
    assert first == tmp_path / "one/hostfs"
    assert (second / "index.json").read_text() == "{}"
    assert len(mkosi.builds) == 1
    shutil.rmtree(first)
    assert (hostfs.build(mkosi, tmp_path / "one") / "index.json").exists()
    assert len(mkosi.builds) == 1


def test_a_profile_is_another_image(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path)
    assert (hostfs.build(mkosi, tmp_path, "demo") / "index.json").read_text() == "demo"
    assert (hostfs.build(mkosi, tmp_path) / "index.json").read_text() == "{}"
    assert ["--profile" in words for words in mkosi.builds] == [False, True]


def test_what_mkosi_is_given(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path)
    assert "--dependency=" in mkosi.builds[0]
    assert mkosi.sources["mosinit.py"] == (ROOT / "mosinit.py").read_text()
    assert "mkosi.conf" in mkosi.sources
    assert not [name for name in mkosi.sources if name.startswith(("mkosi.images", "tests", ".git"))]
    hostfs.kernel(mkosi, tmp_path)
    assert "--dependency=bootkit" in mkosi.builds[1]
    assert not [name for name in mkosi.sources if name.startswith(("mosinit", "mkosi.extra"))]


def test_the_kernel_tree(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    kernel = hostfs.kernel(mkosi, tmp_path)
    assert kernel.version == "6.12.0-test"
    assert kernel.vmlinuz.read_text() == "kernel"
    assert kernel.modules == tmp_path / "kernel/6.12.0-test"


@pytest.mark.parametrize("kernels", [(), ("6.1", "6.12")])
def test_there_must_be_one_kernel(kernels: tuple[str, ...], mkosi: RecordedMkosi, tmp_path: Path) -> None:
    mkosi.kernels = kernels
    if not kernels:
        mkosi.kernels = ("6.1",)
        hostfs.kernel(mkosi, tmp_path)
        (cached,) = tools.cache().glob("bootkit-*")
        (cached / "6.1/vmlinuz").unlink()
        shutil.rmtree(tmp_path / "kernel")
    with pytest.raises(Failure, match=f"must install one kernel, it has {len(kernels)}"):
        hostfs.kernel(mkosi, tmp_path)


def test_a_failed_build_leaves_nothing(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    mkosi.fails = True
    with pytest.raises(Failure, match="no network"):
        hostfs.build(mkosi, tmp_path)
    assert sorted(path.name for path in tools.cache().iterdir()) == ["mkosi.lock", "packages"]
    assert not (tmp_path / "hostfs").exists()
    mkosi.fails = False
    hostfs.build(mkosi, tmp_path)
    assert len(mkosi.builds) == 2


def test_only_the_newest_results_are_kept(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    for number in range(hostfs.KEPT + 2):
        hostfs.build(mkosi, tmp_path, f"profile{number}")
    assert len(list(tools.cache().glob("hostfs-*"))) == hostfs.KEPT


def test_debian_packages_come_from_where_this_host_has_its_own(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path)
    name = "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"
    lines = tools.debian_sources(Path("/etc/apt"), "trixie")
    assert mkosi.sources.get(name, "").count("Suites: ") == len(lines)
    for line in lines:
        assert f"URIs: {line.split()[2]}\nSuites: {line.split()[3]}\n" in mkosi.sources[name]
    mkosi.distribution = "fedora"
    hostfs.build(mkosi, tmp_path, "other")
    assert name not in mkosi.sources


def test_the_umask_of_a_checkout_changes_nothing(tmp_path: Path) -> None:
    for name, mask in (("one", 0o022), ("two", 0o077)):
        folder = tmp_path / name / "mkosi.extra/etc"
        folder.mkdir(parents=True, mode=0o777 & ~mask)
        (folder / "file").write_text("content")
        (folder / "file").chmod(0o666 & ~mask)
        (folder / "tool").write_text("content")
        (folder / "tool").chmod(0o777 & ~mask)
        (folder / "link").symlink_to("/dev/null")
        (folder / "__pycache__").mkdir()
        (tmp_path / name / "staged").mkdir(mode=0o777 & ~mask)
        hostfs.stage(tmp_path / name, ["mkosi.extra"], tmp_path / name / "staged")
    one, two = (tmp_path / name / "staged" for name in ("one", "two"))
    assert hostfs.key_of(one, []) == hostfs.key_of(two, [])
    assert not (one / "mkosi.extra/etc/__pycache__").exists()
    assert (two / "mkosi.extra/etc/file").stat().st_mode & 0o777 == 0o644
    assert os.readlink(two / "mkosi.extra/etc/link") == "/dev/null"


@pytest.mark.parametrize(
    "target", ["sleep", "suspend", "hibernate", "hybrid-sleep", "suspend-then-hibernate"]
)
def test_machines_do_not_sleep(target: str, tmp_path: Path) -> None:
    """What `systemctl mask` makes, and what comes of it in the image's inputs."""
    hostfs.stage(ROOT, ["mkosi.extra"], tmp_path)
    assert os.readlink(tmp_path / f"mkosi.extra/etc/systemd/system/{target}.target") == "/dev/null"


@pytest.mark.parametrize(
    "change",
    ["echo >> mkosi.conf", "chmod +x mkosi.conf", "mv mkosi.conf mkosi.local.conf", "ln -sfn other link"],
)
def test_every_change_of_an_input_is_another_key(change: str, tmp_path: Path) -> None:
    (tmp_path / "mkosi.conf").write_text("[Content]\n")
    (tmp_path / "mkosi.conf").chmod(0o644)
    (tmp_path / "link").symlink_to("one")
    before = hostfs.key_of(tmp_path, [])
    assert hostfs.key_of(tmp_path, []) == before
    subprocess.run(change, shell=True, cwd=tmp_path, check=True)
    assert hostfs.key_of(tmp_path, []) != before


# --- Who may install by SSH --------------------------------------------------------------------------------


def public_key(kind: str = "ed25519", bits: int = 3072) -> str:
    """Return a line of ~/.ssh/authorized_keys."""
    key = (
        ed25519.Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else rsa.generate_private_key(public_exponent=65537, key_size=bits)
    )
    encoded = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return f"{encoded.decode()} somebody"


def token_key() -> str:
    kind = hostfs.TOKEN_KEYS[0].encode()
    return f"{kind.decode()} {base64.b64encode(len(kind).to_bytes(4) + kind + bytes(48)).decode()}"


def test_installer_keys_are_part_of_the_image(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    lines = [public_key(), public_key("rsa"), token_key()]
    path.write_text(f"# of the team\n\n  {lines[0]}  \n{lines[1]}\n{lines[2]}")
    keys = hostfs.read_installer_keys(path)
    assert keys.decode().splitlines() == lines
    hostfs.build(mkosi, tmp_path / "with", installer_keys=keys)
    assert mkosi.sources["mkosi.extra/etc/mosinit/installer_keys"] == keys.decode()
    hostfs.build(mkosi, tmp_path / "without")
    assert "mkosi.extra/etc/mosinit/installer_keys" not in mkosi.sources
    assert len(mkosi.builds) == 2


def test_a_ca_of_registries_is_part_of_the_image(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path / "with", registry_ca=b"its certificate")
    assert mkosi.sources["mkosi.extra/etc/mosinit/registry-ca.pem"] == "its certificate"
    assert Path("/", hostfs.REGISTRY_CA.removeprefix("mkosi.extra")) == registry.HOSTFS_CA
    hostfs.build(mkosi, tmp_path / "without")
    assert "mkosi.extra/etc/mosinit/registry-ca.pem" not in mkosi.sources
    assert len(mkosi.builds) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no public key: put"), ("# nobody\n", "no public key: put"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "no public key of SSH"),
        ("ssh-ed25519 AAAA", "no public key of SSH"), ("ssh-ed25519", "no public key of SSH"),
        ('command="sh" KEY', "no public key of SSH"), ("cert-authority KEY", "no public key of SSH"),
        ("ssh-rsa BLOB", "no public key of SSH"),
        ("sk-ssh-ed25519@openssh.com BLOB", "no public key of SSH"),
        ("KEY\nssh-ed25519 ?", "no public key of SSH"), ("WEAK", "too weak"), (b"\xff\xfe", "cannot read"),
    ],
)  # fmt: skip
def test_what_is_no_key_of_an_installer(text: str | bytes, says: str, tmp_path: Path) -> None:
    path, key = tmp_path / "keys", public_key()
    if isinstance(text, str):
        text = text.replace("KEY", key).replace("BLOB", key.split()[1]).encode()
        text = text.replace(b"WEAK", public_key("rsa", 2048).encode()) if b"WEAK" in text else text
    path.write_bytes(text)
    with pytest.raises(Failure, match=says) as failure:
        hostfs.read_installer_keys(path)
    assert "\n" not in str(failure.value)


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot read the keys"):
        hostfs.read_installer_keys(tmp_path / "none")


# --- What a live system has, and an installed one never starts ---------------------------------------------

UNITS = {
    "mosinit-consoles.service": "mkosi.conf.d/production/mkosi.extra",
    "mosinit-console@.service": "mkosi.conf.d/production/mkosi.extra",
    "mosinit-live-ssh.service": "mkosi.extra",
    "mosinit-install.service": "mkosi.extra",
}


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_for_a_live_machine_is_for_no_other(unit: str) -> None:
    lines = (ROOT / UNITS[unit] / "usr/lib/systemd/system" / unit).read_text().splitlines()
    assert "ConditionPathExists=!/run/mosinit/volume-secret" in lines


def test_sshd_of_a_live_system_takes_keys_of_the_image_for_one_command() -> None:
    """What must never be lost from its configuration; that sshd obeys is seen in a VM."""
    lines = (ROOT / "mkosi.extra/usr/lib/mosinit/sshd_config").read_text().splitlines()
    settings = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    closed = ("PasswordAuthentication", "KbdInteractiveAuthentication", "HostbasedAuthentication", "UsePAM",
              "GSSAPIAuthentication", "PermitUserRC", "PermitUserEnvironment")  # fmt: skip
    assert {name: settings[name] for name in closed} == dict.fromkeys(closed, "no")
    wanted = {
        "AuthenticationMethods": "publickey", "AuthorizedKeysFile": "/etc/mosinit/installer_keys",
        "ForceCommand": "/usr/lib/mosinit/live ssh", "DisableForwarding": "yes", "AllowUsers": "root",
        "HostKey": "/run/mosinit-ssh/host_key", "StrictModes": "yes",
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted
    # Each of these would be another way in, or another command.
    assert not set(settings) & {"Include", "Subsystem", "Match", "AcceptEnv", "AuthorizedKeysCommand"}


def test_no_other_sshd_starts(tmp_path: Path) -> None:
    hostfs.stage(ROOT, ["mkosi.extra"], tmp_path)
    extra = tmp_path / "mkosi.extra"
    preset = (extra / "usr/lib/systemd/system-preset/10-mosinit.preset").read_text().splitlines()
    assert {"disable ssh.service", "disable ssh.socket", "disable sshd.service"} <= set(preset)
    # It makes sockets of its own for sshd on each machine that has one.
    generator = extra / "etc/systemd/system-generators/systemd-ssh-generator"
    assert os.readlink(generator) == "/dev/null"
