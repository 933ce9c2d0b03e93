"""The UKI: kernel, command line, os-release and initrd in one PE file, started by systemd's stub and signed.

ukify puts it together and a signer signs the result; the kernel inside stays unsigned, because whatever db
accepts on its own, without the stub that measures, would let anyone replay the measurements. A UKI has an
id: SHA-256 over the SHA-256 digests of kernel, command line, os-release and initrd. A second small archive
behind the initrd tells the bring-up that id.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mosinit import __version__, approvals, images, init, keys, pe
from mosinit import initrd as initrds
from mosinit.host import Failure, Host

if TYPE_CHECKING:
    from mosinit.hostfs import KernelTree
    from mosinit.keys import Keyset

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")

# Complete: nothing is added from outside, and what is appended behind `--` can only become ignored argv.
# systemd would lay what is below /var/lib/extensions and /var/lib/confexts over /usr and /etc, unsigned.
EXTENSIONS = ("systemd-sysext.service", "systemd-sysext.socket", "systemd-confext.service")
CMDLINE = (
    "console=tty0 console=ttyS0,115200 panic=10 oops=panic lockdown=confidentiality init_on_free=1 "
    "systemd.import_credentials=no systemd.gpt_auto=no "
    f"{' '.join(f'systemd.mask={unit}' for unit in EXTENSIONS)} --"
)

# The sections of ours and those that the stub brings; a UKI of run mode has its approval too.
CONTENT = (".osrel", ".cmdline", ".uname", ".linux", ".initrd")
STUB_SECTIONS = (".text", ".rodata", ".data", ".reloc", ".sdmagic", ".sbat")

BOOTKIT_TYPE = "application/vnd.machine.bootkit"
NOT_OURS = "the initrd of this UKI is not one of mosinit's: use one of `mosinit build`"


@dataclass(frozen=True)
class Uki:
    """A built and signed UKI."""

    path: Path
    uki_id: str


@dataclass(frozen=True)
class Content:
    """What goes into a UKI. `initrd` is the main archive, without the one that carries the id."""

    kernel: bytes
    cmdline: bytes
    osrel: bytes
    uname: bytes
    initrd: bytes

    @property
    def uki_id(self) -> str:
        """The UKI's id."""
        parts = (self.kernel, self.cmdline, self.osrel, self.initrd)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def sections(self) -> dict[str, bytes]:
        """The content of each section of ours."""
        # An archive that is not compressed is found only where its offset is a multiple of four.
        padding = bytes(-len(self.initrd) % 4)
        full = self.initrd + padding + initrds.uki_id_archive(self.uki_id)
        return dict(zip(CONTENT, (self.osrel, self.cmdline, self.uname, self.kernel, full), strict=True))


def os_release(mode: str) -> bytes:
    """Return the os-release of our UKIs: what systemd-boot shows."""
    fields = {
        "ID": "mosinit",
        "NAME": "mosinit",
        "PRETTY_NAME": f"mosinit {__version__} ({mode})",
        "VERSION_ID": __version__,
    }
    return "".join(f'{name}="{value}"\n' for name, value in fields.items()).encode()


def build(
    host: Host,
    kernel: KernelTree,
    initrd: initrds.Initrd,
    keyset: Keyset,
    out: Path,
    cmdline: str = CMDLINE,
) -> Uki:
    """Build and sign a UKI; for run mode, with the approval that lets a TPM open its machine's secrets."""
    content = Content(
        kernel.vmlinuz.read_bytes(),
        cmdline.encode(),
        os_release(initrd.mode),
        kernel.version.encode(),
        initrd.path.read_bytes(),
    )
    return _finish(host, content, keyset, out)


def sign(host: Host, unsigned: Path, initrd: Path, keyset: Keyset, out: Path) -> Uki:
    """Sign a UKI that somebody else's tool has put together from our initrd, a kernel and a command line.

    It is taken apart and put together again, so that it carries its id, and nothing that we do not know.
    What it says of itself counts for nothing: its initrd must be `initrd`, the file that a build of ours
    left, and that one must be for this keyset.
    """
    content = take_apart(unsigned.read_bytes(), str(unsigned))
    built = initrd.read_bytes()
    if content.initrd.rstrip(b"\0") != built.rstrip(b"\0"):
        raise Failure(f"the initrd in {unsigned} is not {initrd}: put the UKI together from that file")
    content = replace(content, initrd=built)
    policy = read_policy(host, built)
    _check_policy(policy, keyset, initrd)
    if policy.cmdline != content.cmdline.decode(errors="replace"):
        raise Failure(
            f"the command line of {unsigned} is not the one in its initrd: {policy.cmdline!r} is expected"
        )
    if policy.kernel != content.uname.decode(errors="replace"):
        raise Failure(
            f"the kernel of {unsigned} is not the one whose modules are in its initrd ({policy.kernel})"
        )
    return _finish(host, content, keyset, out)


def _check_policy(policy: init.Policy, keyset: Keyset, initrd: Path) -> None:
    """See that an initrd was built for this keyset."""
    authority = keyset.certificate_path("manifest-ca").read_bytes()
    db = tuple(initrds.fingerprint(keyset.certificate(role)) for role in ("uki", "layer"))
    ours = (keyset.product, db, authority, initrds.revoked(keyset))
    if (policy.product, policy.db, policy.manifest_ca, [*policy.revoked]) != ours:
        raise Failure(f"{initrd} was built for another keyset: build it with this one, {keyset.folder}")


def _approved_epoch(host: Host, content: Content) -> int | None:
    """Return the epoch of a UKI that may open a machine's secrets, None for one of another mode.

    The policy in its own initrd decides, whatever is said about it: only run mode keeps the secrets to
    itself. Raises `Failure` if the command line is not the policy's.
    """
    try:
        fields = json.loads(_policy_files(host, content.initrd)[0])
        mode, cmdline, epoch = fields["mode"], fields["cmdline"], int(fields["epoch"])
    except (KeyError, ValueError, TypeError) as error:
        raise Failure(NOT_OURS) from error
    if mode != "run":
        return None
    if cmdline != content.cmdline.decode():
        raise Failure(f"the initrd of this UKI is for the command line {cmdline!r}: it is not approved")
    return epoch


def read_policy(host: Host, initrd: bytes) -> init.Policy:
    """Return the policy in one of our initrds. Raises `Failure` if it is not one of ours."""
    try:
        policy, authority = _policy_files(host, initrd)
        return init.parse_policy(policy, b"", {"manifest-ca.pem": authority})
    except (KeyError, ValueError) as error:
        raise Failure(NOT_OURS) from error


def _policy_files(host: Host, initrd: bytes) -> list[bytes]:
    """Return the policy and the manifest CA in one of our initrds."""
    try:
        archive = host.run(["zstd", "-dcq"], stdin=initrd)
        # The device nodes are an archive of their own before the files'.
        files = archive[archive.index(b"TRAILER!!!") + 10 :].lstrip(b"\0")
        names = ("policy.json", "organisation/manifest-ca.pem")
        return _unpack(host, files, *(f"etc/mosinit/{name}" for name in names))
    except (OSError, ValueError, Failure) as error:
        raise Failure(NOT_OURS) from error


def _unpack(host: Host, archive: bytes, *names: str) -> list[bytes]:
    """Return files of a cpio archive."""
    with host.scratch() as folder:
        host.run(["cpio", "--quiet", "-id", *names], stdin=archive, cwd=folder)
        return [(folder / name).read_bytes() for name in names]


def take_apart(data: bytes, name: str) -> Content:
    """Return the content of an unsigned UKI. Raises `Failure` if it has a section that we do not know."""
    try:
        image = pe.parse(data)
        sections = {section: image.section(data, section) for section in CONTENT}
    except ValueError as error:
        raise Failure(f"{name} is not a UKI ({error}): name the one that mkosi or ukify made") from error
    if image.signed_size:
        raise Failure(
            f"{name} is signed already: name the UKI that mkosi or ukify made, without a signature"
        )
    missing = [section for section, content in sections.items() if not content]
    if missing:
        raise Failure(
            f"{name} is not a UKI (it has no section {', '.join(missing)}): "
            "name the one that mkosi or ukify made"
        )
    unknown = image.names - {*CONTENT, *STUB_SECTIONS}
    if unknown:
        raise Failure(f"{name} has sections that a signed UKI must not have: {', '.join(sorted(unknown))}")
    osrel, cmdline, uname, kernel, initrd = (sections[section] for section in CONTENT)
    # mkosi ends the command line with a zero byte, as the stub would.
    return Content(kernel, cmdline.rstrip(b"\0\n "), osrel, uname.rstrip(b"\0\n"), initrd)


def _finish(host: Host, content: Content, keyset: Keyset, out: Path) -> Uki:
    """Put a UKI together, see that it is what was meant, and sign it; one of run mode is approved, too."""
    epoch = _approved_epoch(host, content)
    with host.scratch(out) as folder:
        unsigned = folder.absolute() / "unsigned.efi"
        _assemble(host, content.sections(), unsigned)
        if epoch is not None:
            keys.choose_epoch(epoch, keyset.epoch, "take the initrd of a new `mosinit build`")
            measured = unsigned.read_bytes()
            approval = approvals.approve_uki(keyset, measured, epoch)
            _assemble(host, {**content.sections(), approvals.APPROVAL: approval}, unsigned)
            if approvals.predict_pcr11(unsigned.read_bytes()) != approvals.predict_pcr11(measured):
                raise Failure("a UKI is measured otherwise with its approval: use the tools tree's ukify")
        keyset.signer("uki").sign_pe(unsigned, folder / "signed.efi")
        db = [keyset.certificate_path(role) for role in ("uki", "layer")]
        check_signed_binaries(host, [folder / "signed.efi"], db)
        (folder / "signed.efi").rename(out)
        host.sync_file(out.absolute().parent)
    return Uki(out, content.uki_id)


def _assemble(host: Host, sections: Mapping[str, bytes], out: Path) -> None:
    """Run ukify on exactly these sections, in the folder of `out`, and see that it made just that."""
    folder = out.parent
    (folder / "ukify.conf").touch()  # named so that no ukify.conf of this machine is read
    for name, data in sections.items():
        (folder / name[1:]).write_bytes(data)
    command: list[str | Path] = [
        "ukify", "build", "--config=ukify.conf", f"--stub={STUB}", "--efi-arch=x64",
        "--linux=linux", "--initrd=initrd", "--cmdline=@cmdline", "--os-release=@osrel",
        f"--uname={sections['.uname'].decode()}", "--no-sign-kernel", f"--output={out.name}",
    ]  # fmt: skip
    command += [f"--section={name}:@{name[1:]}" for name in sections if name not in CONTENT]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    host.run(command, env=environment, cwd=folder, timeout=300)
    _check(out, sections)


def _check(path: Path, expected: Mapping[str, bytes]) -> None:
    """See that ukify took the parts as they are and added nothing: the id is over these bytes."""
    data = path.read_bytes()
    image = pe.parse(data)
    changed = [name for name, content in expected.items() if image.section(data, name) != content]
    known = {*expected, *STUB_SECTIONS}
    if changed or image.names != known:
        seen = ", ".join(changed or sorted(image.names ^ known))
        raise Failure(f"ukify made another UKI than asked for ({seen}): use the tools tree's ukify")


# --- The bootkit: the UKI of run mode and the modules of its kernel as an image ---------------------


def bootkit(
    host: Host, kernel: KernelTree, ukis: Mapping[str, Uki], layout: images.Layout
) -> images.Descriptor:
    """Make an OCI layout hold the bootkit image: a layer with the kernel's modules, and the UKI of run mode.

    Its annotations name the UKI of each mode (`run`, `live`) that may boot a manifest with this bootkit.
    """
    with host.scratch(layout.path) as folder:
        copy_modules(kernel.modules, folder / "usr/lib/modules" / kernel.version)
        modules = images.tree_layer(host, folder, layout)
    binary = layout.add_blob(host, ukis["run"].path, init.UKI_MEDIA_TYPE)
    empty = layout.add_blob(host, b"{}", images.EMPTY_TYPE)
    manifest = {
        "schemaVersion": 2,
        "mediaType": images.MANIFEST_TYPE,
        "artifactType": BOOTKIT_TYPE,
        "config": empty.json(),
        "layers": [modules.json(), binary.json()],
        "annotations": {init.UKI_ID_ANNOTATIONS[mode]: uki.uki_id for mode, uki in ukis.items()},
    }
    image = layout.add_blob(host, images.encode(manifest), images.MANIFEST_TYPE, artifact_type=BOOTKIT_TYPE)
    layout.write_index(host, [image])
    return image


def copy_modules(modules: Path, target: Path) -> None:
    """Copy a kernel's modules without the kernel and the links to its sources; modes and dates are fixed."""
    shutil.copytree(
        modules, target, ignore=shutil.ignore_patterns("build", "source", "vmlinuz", "vmlinuz-*")
    )
    for folder, _, files in os.walk(target.parents[3]):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            path.chmod(0o755 if path.is_dir() else 0o644)
            os.utime(path, (0, 0))


# --- What db accepts: nothing but UKIs and systemd-boot ---------------------------------------------

MAX_DEPTH = 4
FAT_MAGICS = ((82, b"FAT32   "), (54, b"FAT16   "), (54, b"FAT12   "))
EROFS_MAGIC = (1024, b"\xe2\xe1\xf5\xe0")
SQUASHFS_MAGIC = (0, b"hsqs")
GPT_MAGIC = (512, b"EFI PART")
# Whole archives (cpio, tar) once unpacked show their files' bytes as they are.
PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz"}


@dataclass(frozen=True)
class Binary:
    """A PE file that was found: where, what it is, and whether a certificate of db verifies it."""

    place: str
    kind: str
    accepted: bool


def check_signed_binaries(
    host: Host, paths: Iterable[Path], certificates: Iterable[Path]
) -> tuple[Binary, ...]:
    """Find every PE in files, folders and images, nested ones too, and see which of them db would accept.

    Raises `Failure` if something other than a UKI or systemd-boot is accepted: started without the stub it
    could extend PCR 11 as it likes, and open what is sealed to a UKI.
    """
    certificates = tuple(certificates)
    found: list[Binary] = []
    for path in paths:
        found += _search(host, path, str(path), certificates, MAX_DEPTH)
    for binary in found:
        if binary.accepted and binary.kind == "other":
            raise Failure(
                f"{binary.place} is neither a UKI nor systemd-boot and is signed for db: do not sign it"
            )
    return tuple(found)


def _search(
    host: Host, path: Path, place: str, certificates: tuple[Path, ...], depth: int
) -> Iterator[Binary]:
    """Search a folder or file; a file that is an image of a file system or disk is opened as well."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            yield from _search(host, inner, f"{place}/{inner.name}", certificates, depth)
    elif path.is_file() and path.stat().st_size > 0:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for image in pe.find(data):
                yield _judge(host, data, image, place, certificates)
            if depth:
                yield from _search_inside(host, data, path, place, certificates, depth - 1)


def _search_inside(
    host: Host, data: mmap.mmap, path: Path, place: str, certificates: tuple[Path, ...], depth: int
) -> Iterator[Binary]:
    """Search what the bytes of an image do not show: files in pieces (FAT) or compressed (erofs, zstd)."""

    def has(offset: int, magic: bytes) -> bool:
        return data[offset : offset + len(magic)] == magic

    with host.scratch() as folder:
        if has(*GPT_MAGIC):
            entries = data[1024 : 1024 + 128 * 128]
            for part in init.parse_gpt(data[512:1024], entries, 512, len(data) // 512):
                (folder / str(part.number)).write_bytes(data[part.start : part.start + part.size])
        elif any(has(*magic) for magic in FAT_MAGICS):
            host.run(["mcopy", "-s", "-n", "-Q", "-i", path, "::*", folder])
        elif has(*EROFS_MAGIC):
            host.run(["fsck.erofs", "--no-preserve", f"--extract={folder}/root", path])
        elif has(*SQUASHFS_MAGIC):
            host.run(["unsquashfs", "-no-progress", "-no-xattrs", "-d", folder / "root", path])
        else:
            for magic, program in PACKED.items():
                if has(0, magic):
                    (folder / "unpacked").write_bytes(host.run([program, "-dcq"], stdin=data[:]))
        yield from _search(host, folder, place, certificates, depth)


def _judge(
    host: Host, data: mmap.mmap, image: pe.Image, place: str, certificates: tuple[Path, ...]
) -> Binary:
    accepted = False
    if image.signed_size:
        with host.scratch() as folder:
            binary = folder / "binary.efi"
            binary.write_bytes(data[image.offset : image.offset + image.signed_size])
            accepted = any(_verifies(host, binary, certificate) for certificate in certificates)
    return Binary(f"{place}+{image.offset:#x}", kind(data, image), accepted)


def _verifies(host: Host, binary: Path, certificate: Path) -> bool:
    try:
        host.run(["sbverify", "--cert", certificate, binary])
    except Failure:
        return False
    return True


def kind(data: pe.Bytes, image: pe.Image) -> str:
    """Say what a PE file is: "UKI", "systemd-boot" or "other"."""
    magic = image.section(data, ".sdmagic") if ".sdmagic" in image.names else b""
    if magic.startswith(b"#### LoaderInfo: systemd-stub ") and {*CONTENT} <= image.names:
        return "UKI"
    return "systemd-boot" if magic.startswith(b"#### LoaderInfo: systemd-boot ") else "other"
