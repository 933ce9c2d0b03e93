"""The initrd: what the frozen bring-up needs to run, and nothing else, packed so that two builds are equal.

`build` writes the policy and runs `build-initrd.sh`, which packs; the shell script calls this file (`python3
-m mosinit.initrd stage|nodes|weigh`) for everything that takes thought: which Python modules, which ELF
files, which kernel modules in which order. In the initrd then lie

    /init                               two lines: import the core, call its main
    /usr/bin/python3                    the interpreter; its libraries, found by following DT_NEEDED
    /usr/lib/python313.zip              bytecode of the core and of exactly the modules that it imports
    /usr/lib/modules/VERSION/kernel/…   the modules that the policy lists, uncompressed
    /usr/sbin/mke2fs                    in run mode, which makes a fresh scratch at each boot
    /etc/mosinit/policy.json            what the build decided
    /etc/mosinit/organisation/          the public parts of the keyset
    /etc/mosinit/uki-id                 in a second small archive, which `uki` appends
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mosinit.host import Failure, Host, closed_environment

if TYPE_CHECKING:
    from cryptography import x509

    from mosinit.hostfs import KernelTree
    from mosinit.keys import Keyset

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHON = "/usr/bin/python3"
DIST_PACKAGES = "/usr/lib/python3/dist-packages"
INIT = b"#!/usr/bin/python3 -ISB\nimport mosinit; mosinit.main()\n"

FOLDERS = (
    "atomfs-cache", "config", "dev", "etc/mosinit", "proc", "run", "scratch-writes", "sys", "sysroot",
    "usr/bin", "usr/lib", "usr/lib64",
)  # fmt: skip
LINKS = {"lib": "usr/lib", "lib64": "usr/lib64"}

# What kernel and interpreter use before /dev is mounted; linux/Documentation/admin-guide/devices.txt
NODES = {"dev/console": (0o600, (5, 1)), "dev/kmsg": (0o600, (1, 11)), "dev/null": (0o666, (1, 3))}

LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")

# Libraries that no DT_NEEDED names because a program opens them by name: soname, and who opens it when.
DLOPENED = {
    "libgcc_s.so.1": "glibc, when a thread is cancelled or exits; without it the process aborts",
}
RUN_DLOPENED = {"libcryptsetup.so.12": "the bring-up, when it opens an encrypted volume"}
RUN_PROGRAMS = ("/usr/sbin/mke2fs",)

# What no mode can do without. Parameters: finit_module takes none from the kernel command line.
NEEDED_MODULES: Mapping[str, Mapping[str, str]] = {
    "efivarfs": {},
    "loop": {},
    "dm_verity": {"require_signatures": "Y"},
    "erofs": {},
    "squashfs": {},
    "overlay": {},
}

# What run mode cannot do without, and the ciphers that dm-crypt asks for by name.
RUN_MODULES: Mapping[str, Mapping[str, str]] = {"ext4": {}, "dm_integrity": {}, "dm_crypt": {}, "xts": {}}
CIPHER_MODULES: Mapping[str, Mapping[str, str]] = {
    "crypto_null": {}, "ecb": {}, "hmac": {}, "authenc": {}, "aesni_intel": {},
}  # fmt: skip

# Drivers, loaded where the kernel has them: a machine lacks most of this hardware anyway.
DRIVER_MODULES: Mapping[str, Mapping[str, str]] = {
    "sha256_ssse3": {},
    "i6300esb": {},
    "iTCO_wdt": {},
    "virtio_pci": {},
    "virtio_blk": {},
    "virtio_scsi": {},
    "nvme": {},
    "ahci": {},
    "xhci_pci": {},
    "ehci_pci": {},
    "usb_storage": {},
    "uas": {},
    "sd_mod": {},
    "tpm_crb": {},
    "tpm_tis": {},
}

# Drivers of disks and what leads to them: many, slow to look around, and only one of them finds the boot
# disk. They come last, since every module that is loaded after them would wait for them.
BACKGROUND_MODULES = {
    "virtio_blk", "virtio_scsi", "nvme", "ahci", "xhci_pci", "ehci_pci", "usb_storage", "uas", "sd_mod",
}  # fmt: skip

MODULE_SIGNATURE = b"~Module signature appended~\n"  # linux/scripts/sign-file.c


@dataclass(frozen=True)
class Part:
    """What one part of the initrd weighs, in bytes: in memory, and its share of the compressed file."""

    name: str
    size: int
    compressed: int


@dataclass(frozen=True)
class Initrd:
    """A built initrd."""

    path: Path
    mode: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class KernelModule:
    """One kernel module: the kernel's name, its file below the folder of the version, parameters."""

    name: str
    file: str
    parameters: Mapping[str, str]

    @property
    def background(self) -> bool:
        """Say whether its probing may go on while the bring-up does."""
        return self.name in BACKGROUND_MODULES


# --- Kernel modules: which, in which order --------------------------------------------------------


def module_name(file: str) -> str:
    """Return the kernel's name of a module file."""
    return file.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def plan_modules(tree: Path, mode: str = "live") -> tuple[KernelModule, ...]:
    """List the modules to load from `tree` (lib/modules/VERSION), in load order, without what is built in.

    Raises `Failure` if the kernel lacks one that the mode needs.
    """
    needed = {**NEEDED_MODULES, **(RUN_MODULES if mode == "run" else {})}
    others = {**(CIPHER_MODULES if mode == "run" else {}), **DRIVER_MODULES}
    files = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        file, _, needs = line.partition(":")
        files[module_name(file)] = (file, needs.split())
    builtin = {module_name(line) for line in (tree / "modules.builtin").read_text().splitlines()}
    softdeps = _soft_dependencies(tree)
    plan: dict[str, KernelModule] = {}

    def add(name: str, parameters: Mapping[str, str]) -> None:
        if name in plan or name not in files:
            return
        file, needs = files[name]
        for need in (*softdeps.get(name, ()), *(module_name(need) for need in reversed(needs))):
            add(need, {})
        plan[name] = KernelModule(name, file.partition(".ko")[0] + ".ko", parameters)

    for name, parameters in {**needed, **others}.items():
        if name in needed and name not in files and name not in builtin:
            raise Failure(f"the kernel in {tree} has no module {name}: use a kernel that has it")
        add(name, parameters)
    return tuple(sorted(plan.values(), key=lambda module: module.background))


def _soft_dependencies(tree: Path) -> dict[str, list[str]]:
    """Read what modprobe would load first although no symbol needs it, such as a hash."""
    aliases: dict[str, list[str]] = {}
    for line in (tree / "modules.alias").read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias" and "*" not in words[1]:
            aliases.setdefault(words[1].replace("-", "_"), []).append(words[2])
    found: dict[str, list[str]] = {}
    for line in (tree / "modules.softdep").read_text().splitlines():
        words = line.partition(" post:")[0].split()
        if len(words) > 3 and words[0] == "softdep" and words[2] == "pre:":
            names = [name.replace("-", "_") for name in words[3:]]
            found.setdefault(words[1].replace("-", "_"), []).extend(
                real for name in names for real in (name, *aliases.get(name, ()))
            )
    return found


def read_module(host: Host, tree: Path, file: str) -> bytes:
    """Return a module, uncompressed and with its signature. Raises `Failure` if it has none."""
    for suffix, decompress in (
        ("", bytes),
        (".xz", lzma.decompress),
        (".gz", gzip.decompress),
        (".zst", lambda data: host.run(["zstd", "-dcq"], stdin=data, env=closed_environment())),
    ):
        path = tree / (file + suffix)
        if path.exists():
            data = decompress(path.read_bytes())
            if not data.endswith(MODULE_SIGNATURE):
                raise Failure(
                    f"{path} is not signed, so a locked-down kernel refuses it: use signed modules"
                )
            return data
    raise Failure(f"{tree / file} is missing: the folder of modules is not complete")


# --- Policy: what the build decides for the bring-up (read by `init.parse_policy`) ----------------


def encode_policy(
    *,
    mode: str,
    product: str,
    epoch: int,
    kernel: str,
    cmdline: str,
    db: Sequence[str],
    platform: Sequence[str],
    modules: Iterable[KernelModule],
    revoked: Sequence[str] = (),
) -> bytes:
    """Encode policy.json. `db`: SHA-256 of each certificate that db must hold; `platform`: their key ids.

    `revoked`: SHA-256 of each product certificate that counts no more.
    """
    return _json(
        {
            "schema": 1,
            "mode": mode,
            "product": product,
            "epoch": epoch,
            "kernel": kernel,
            "cmdline": cmdline,
            "db": list(db),
            "platform": list(platform),
            "revoked": list(revoked),
            "modules": [
                {
                    "name": module.name,
                    "path": f"/usr/lib/modules/{kernel}/{module.file}",
                    "parameters": dict(module.parameters),
                    "background": module.background,
                }
                for module in modules
            ],
        }
    )


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


# --- ELF: which files a program needs -------------------------------------------------------------


def elf_closure(files: Iterable[Path], dlopened: Iterable[str] = DLOPENED) -> dict[str, Path]:
    """Return what the dynamic loader opens for `files`, itself included: place in the initrd to real file.

    Raises `Failure` for a library that is not found and for one that brings a search path of its own.
    """
    opened = [_library(name) for name in dlopened]
    found = {str(library): Path(os.path.realpath(library)) for library in opened}
    waiting = [*files, *opened]
    while waiting:
        path = waiting.pop()
        for name in _needed(path):
            library = _library(name)
            if str(library) not in found:
                found[str(library)] = Path(os.path.realpath(library))
                waiting.append(library)
    return found


def _library(name: str) -> Path:
    """Find a library as the loader will in the initrd, which has the same folders and no cache."""
    for folder in LIBRARY_FOLDERS:
        path = Path(folder, name.rpartition("/")[2])
        if path.exists():
            return path
    raise Failure(f"the library {name} is in none of {', '.join(LIBRARY_FOLDERS)}: install its package")


def _needed(path: Path) -> list[str]:
    """Return the names that an ELF file asks for: libraries, and its loader."""
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    names = []
    with path.open("rb") as file:
        for segment in ELFFile(file).iter_segments():
            if isinstance(segment, InterpSegment):
                names.append(segment.get_interp_name())
            if isinstance(segment, DynamicSegment):
                for tag in segment.iter_tags():
                    if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                        raise Failure(f"{path} has a library search path of its own: build it without")
                    if tag.entry.d_tag == "DT_NEEDED":
                        names.append(tag.needed)
    return names


# --- The archive format of initrds (Documentation/driver-api/early-userspace/buffer-format.rst) ---


def encode_cpio(entries: Iterable[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    """Encode a `newc` archive of (name, mode, content, device numbers), owned by root, dated 1970."""
    archive = io.BytesIO()
    end = ("TRAILER!!!", 0, b"", (0, 0))
    for inode, (name, mode, content, device) in enumerate((*entries, end), 1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        archive.write(
            b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name.encode() + b"\0"
        )
        archive.write(bytes(-archive.tell() % 4) + content)
        archive.write(bytes(-archive.tell() % 4))
    return archive.getvalue()


def device_nodes() -> bytes:
    """Return an archive of the device nodes: made here, so that packing takes no privilege."""
    folder = ("dev", stat.S_IFDIR | 0o755, b"", (0, 0))
    nodes = [(name, stat.S_IFCHR | mode, b"", device) for name, (mode, device) in NODES.items()]
    return encode_cpio([folder, *nodes])


def uki_id_archive(uki_id: str) -> bytes:
    """Return the small archive that goes behind the initrd and tells it its own UKI's id."""
    folder = ("etc/mosinit", stat.S_IFDIR | 0o755, b"", (0, 0))
    return encode_cpio(
        [folder, ("etc/mosinit/uki-id", stat.S_IFREG | 0o444, uki_id.encode() + b"\n", (0, 0))]
    )


# --- Staging: the tree that is packed -------------------------------------------------------------


def stage(host: Host, modules: Path, policy: Path, organisation: Path, root: Path) -> list[str]:
    """Lay out the initrd's files below `root`; return the list of what is in it, one line each, sorted."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    _put(root, "/init", INIT, executable=True)
    _put(root, "/etc/mosinit/policy.json", policy.read_bytes())
    for name in public_parts():
        if not (organisation / name).is_file():
            raise Failure(f"{organisation} lacks {name}: name a keyset, or what `keys export` made of it")
        _put(root, f"/etc/mosinit/organisation/{name}", (organisation / name).read_bytes())
    mode = json.loads(policy.read_bytes())["mode"]
    contents = [*_stage_python(host, root, mode), *_stage_modules(host, modules, policy, root)]
    _settle(root)
    return sorted([*contents, *_files(root)])


def public_parts() -> list[str]:
    """Name the files of a keyset that are no secret."""
    from mosinit import keys

    certificates = [f"{role}.pem" for role in keys.ROLES]
    return ["keyset.json", *certificates, *(f"{role}.pub" for role in keys.ROLES if keys.ROLES[role].public)]


def _stage_python(host: Host, root: Path, mode: str) -> Iterator[str]:
    """Freeze the core; add interpreter, extension modules, the programs of run mode, and their libraries."""
    archive = root / "usr/lib/python.zip"
    # The person's environment must not lead the scan to other modules than the initrd will have.
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "CRYPTOGRAPHY_OPENSSL_NO_LEGACY": "1"}
    script, core = CHECKOUT / "mosinit/frozen.py", CHECKOUT / "mosinit.py"
    command: list[str | Path] = [PYTHON, "-ISB", script, core, DIST_PACKAGES, archive]
    listing = json.loads(host.run(command, env=environment))
    archive.chmod(0o644)
    version = listing["version"]
    archive.rename(archive.with_name(f"python{version.replace('.', '')}.zip"))
    interpreter = Path(os.path.realpath(PYTHON))
    _put(root, f"/usr/bin/python{version}", interpreter.read_bytes(), executable=True)
    (root / "usr/bin/python3").symlink_to(f"python{version}")
    extensions = {entry["place"]: Path(entry["file"]) for entry in listing["extensions"]}
    programs = {place: Path(place) for place in RUN_PROGRAMS} if mode == "run" else {}
    dlopened = [*DLOPENED, *(RUN_DLOPENED if mode == "run" else {})]
    libraries = elf_closure([interpreter, *extensions.values(), *programs.values()], dlopened)
    for place, source in {**extensions, **libraries, **programs}.items():
        _put(root, place, source.read_bytes(), executable=place not in extensions)
    loader = next(name for name in _needed(interpreter) if "/" in name)
    _link_loader(root, loader, _library(loader))
    for name in listing["modules"]:
        yield f"python {name}" + (" (stand-in)" if name in listing["left_out"] else "")


def _link_loader(root: Path, name: str, place: Path) -> None:
    """Make the loader reachable by the name that is written in every program (/lib64/…)."""
    link = root / "usr" / name.lstrip("/")
    if link != root / str(place).lstrip("/"):
        link.symlink_to(os.path.relpath(root / str(place).lstrip("/"), link.parent))


def _stage_modules(host: Host, modules: Path, policy: Path, root: Path) -> Iterator[str]:
    """Add the kernel modules that the policy lists."""
    for module in json.loads(policy.read_bytes())["modules"]:
        prefix = f"/usr/lib/modules/{modules.name}/"
        if not module["path"].startswith(prefix):
            raise Failure(f"the policy names {module['path']}, which is not of the kernel {modules.name}")
        _put(root, module["path"], read_module(host, modules, module["path"].removeprefix(prefix)))
        yield f"module {module['name']}"


def _put(root: Path, place: str, content: bytes, *, executable: bool = False) -> None:
    path = root / place.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755 if executable else 0o644)


def _settle(root: Path) -> None:
    """Give every file the same date and every folder the same mode, whatever the build machine's are."""
    for folder, folders, files in os.walk(root):
        os.chmod(folder, 0o755)
        for name in (*folders, *files, "."):
            os.utime(os.path.join(folder, name), (0, 0), follow_symlinks=False)


def _files(root: Path) -> Iterator[str]:
    """Name every file; kernel modules are named elsewhere, for their paths change with each kernel."""
    for path in root.rglob("*"):
        place = f"/{path.relative_to(root)}"
        if (path.is_symlink() or not path.is_dir()) and not place.startswith("/usr/lib/modules/"):
            yield f"file {place}"
    yield from (f"node /{name}" for name in NODES)


# --- Weighing: where the bytes are ----------------------------------------------------------------

PARTS = (
    "python and its library", "cryptography and libcrypto", "volumes", "libc", "kernel modules", "mosinit",
)  # fmt: skip


CRYPTOGRAPHY = ("libcrypto.", "libssl", "libzstd", "libgcc_s", "_cffi_backend", "_hashlib")


VOLUMES = (
    "mke2fs", "libcryptsetup", "libdevmapper", "libblkid", "libuuid", "libjson-c", "libudev", "libselinux",
    "libpcre2", "libcap", "libext2fs", "libe2p", "libcom_err", "libpopt", "libargon2",
)  # fmt: skip


def part_of(place: str) -> str:
    """Say to which part a file of the initrd, or a member of its archive of modules, belongs."""
    name = place.rpartition("/")[2]
    if place.startswith("/usr/lib/modules/"):
        return "kernel modules"
    if place in ("/init", "mosinit.pyc") or place.startswith("/etc/mosinit/"):
        return "mosinit"
    if "cryptography/" in place or name.startswith(CRYPTOGRAPHY):
        return "cryptography and libcrypto"
    if name.startswith(VOLUMES):
        return "volumes"
    if name.startswith(("libc.so", "libm.so", "ld-linux")):
        return "libc"
    return "python and its library"


def weigh(host: Host, root: Path, packed: int) -> tuple[Part, ...]:
    """Weigh each part: its bytes, and its share of the `packed` bytes (compressed alone, then scaled)."""
    content: dict[str, bytearray] = {name: bytearray() for name in PARTS}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            for place, data in _members(f"/{path.relative_to(root)}", path):
                content[part_of(place)] += data
    alone = {
        name: len(host.run(["zstd", "-9", "-cq"], stdin=bytes(data), env=closed_environment()))
        for name, data in content.items()
    }
    scale = packed / sum(alone.values())
    return tuple(Part(name, len(content[name]), round(alone[name] * scale)) for name in PARTS)


def _members(place: str, path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix != ".zip":
        yield place, path.read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        yield from ((name, archive.read(name)) for name in archive.namelist())


def read_parts(path: Path) -> tuple[tuple[Part, ...], int]:
    """Read a FILE.parts.json: the parts, and the bytes of the compressed file."""
    report = json.loads(path.read_bytes())
    return tuple(Part(**part) for part in report["parts"]), int(report["compressed"])


def table(parts: Iterable[Part], packed: int) -> str:
    """Show the parts for people."""
    rows = [(part.name, part.size, part.compressed) for part in parts]
    rows.append(("in all", sum(row[1] for row in rows), packed))
    lines = [f"{'':28}{'bytes':>12}{'compressed':>12}"]
    return (
        "\n".join([*lines, *(f"{name:28}{size:12,}{compressed:12,}" for name, size, compressed in rows)])
        + "\n"
    )


# --- Building -------------------------------------------------------------------------------------


def build(
    host: Host, kernel: KernelTree, keyset: Keyset, out: Path, *, mode: str, epoch: int, cmdline: str
) -> Initrd:
    """Build the initrd for one kernel, organisation and mode; MODE.policy.json stays beside it."""
    db = [keyset.certificate(role) for role in ("uki", "layer")]
    policy = encode_policy(
        mode=mode,
        product=keyset.product,
        epoch=epoch,
        kernel=kernel.version,
        cmdline=cmdline,
        db=[fingerprint(certificate) for certificate in db],
        platform=[key_id(certificate) for certificate in db],
        modules=plan_modules(kernel.modules, mode),
        revoked=revoked(keyset),
    )
    kept = out.with_name(f"{mode}.policy.json")
    with host.replacing(kept) as path:
        path.write_bytes(policy)
    with host.scratch(out) as folder:
        shown = host.run(
            [CHECKOUT / "build-initrd.sh",
             "--kernel-modules", kernel.modules, "--policy", kept,
             "--organisation", keyset.folder, "--out", out],
            timeout=900,
            env=closed_environment(TMPDIR=folder),
        )  # fmt: skip
    for line in shown.decode().splitlines():
        host.say(line)
    return Initrd(out, mode, read_parts(Path(f"{out}.parts.json"))[0])


def revoked(keyset: Keyset) -> list[str]:
    """Return the fingerprints of the product certificates in the keyset's folder `revoked`."""
    from cryptography import x509

    files = sorted((keyset.folder / "revoked").glob("*.pem"))
    return sorted(fingerprint(x509.load_pem_x509_certificate(file.read_bytes())) for file in files)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in DER form: how the policy names an entry of db."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def key_id(certificate: x509.Certificate) -> str:
    """Return how the kernel's keyrings end a certificate's description: its key id, else its serial number.

    Source: linux/crypto/asymmetric_keys/x509_public_key.c, x509_key_preparse.
    """
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
    except x509.ExtensionNotFound:
        serial = certificate.serial_number
        return serial.to_bytes(serial.bit_length() // 8 + 1, "big").hex()


# --- What build-initrd.sh calls -------------------------------------------------------------------


def main(arguments: Sequence[str], output: BinaryIO) -> int:
    """Run one step of build-initrd.sh."""
    parser = argparse.ArgumentParser(prog="mosinit.initrd")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("stage", help="lay out the initrd's files; prints what is in it")
    for option in ("--kernel-modules", "--policy", "--organisation", "--root"):
        step.add_argument(option, type=Path, required=True)
    steps.add_parser("nodes", help="print the archive of device nodes")
    step = steps.add_parser("weigh", help="print what each part weighs, as JSON")
    step.add_argument("--root", type=Path, required=True)
    step.add_argument("--packed", type=Path, required=True)
    step = steps.add_parser("table", help="print what each part weighs, for people")
    step.add_argument("parts", type=Path)
    options = parser.parse_args(arguments)
    try:
        output.write(_step(Host(), options))
    except Failure as failure:
        print(f"mosinit: {failure}", file=sys.stderr)
        return failure.status
    return 0


def _step(host: Host, options: argparse.Namespace) -> bytes:
    if options.step == "stage":
        modules = options.kernel_modules.resolve()
        contents = stage(host, modules, options.policy, options.organisation, options.root)
        return "".join(f"{line}\n" for line in contents).encode()
    if options.step == "nodes":
        return device_nodes()
    if options.step == "weigh":
        packed = options.packed.stat().st_size
        parts = weigh(host, options.root, packed)
        return _json({"schema": 1, "compressed": packed, "parts": [asdict(part) for part in parts]})
    return table(*read_parts(options.parts)).encode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout.buffer))
