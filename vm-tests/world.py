"""One organisation, one UKI and one good medium for all VM tests, and the means to make bad ones.

A refusal that only the medium's content decides is tested on a *restored* machine: saved at the first line
of the bring-up, it goes on with other disk content under a second. `--cold` boots those from power-on too.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path

from programs import init_program

from mosinit import build, disk, images, init, keys, publish, vm
from mosinit.host import Host
from mosinit.machine import Hardware

SIZE = 256 << 20  # of every medium: a restored machine remembers the size of its disk
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Stacker:
    """A layer as stacker makes it: a squashfs, and verity data with a random salt behind it."""

    files: Files
    compressor: str = "zstd"
    annotation: str = init.ROOT_HASH_ANNOTATIONS[0]
    hidden: tuple[str, ...] = ()  # by overlayfs's mark, which stacker copies from its own overlay


Layer = Files | Stacker


@dataclass
class World:
    """A keyset with its UKI, a hostfs of one program, and the media made of them."""

    host: Host
    folder: Path
    cold: bool
    given: InitVar[keys.Keyset | None] = None
    keyset: keys.Keyset = field(init=False)
    bootable: build.Bootable = field(init=False)
    saved: Path | None = None

    def __post_init__(self, given: keys.Keyset | None) -> None:
        self.keyset = given or keys.new(self.host, self.folder / "keys", "vm-tests")
        (self.folder / "out").mkdir()
        self.bootable = build.make_bootable(self.host, self.keyset, self.folder / "out", 1)

    def image(self, name: str, *layers: Layer) -> Path:
        """Make an OCI layout with an image of these layers, the lowest first."""
        layout = self.folder / name
        shutil.rmtree(layout, ignore_errors=True)
        made = [
            put_stacker(self.host, layout, layer)
            if isinstance(layer, Stacker)
            else put(layout, make_tar(layer), "application/vnd.oci.image.layer.v1.tar")
            for layer in layers
        ]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in made]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": put(layout, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": made,
        }
        kind = str(manifest["mediaType"])
        entry_of_index = put(layout, json.dumps(manifest).encode(), kind)
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry_of_index]}))
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return layout

    def release(
        self,
        name: str,
        hostfs: Files | Sequence[Layer] | None,
        keyset: keys.Keyset | None = None,
        epoch: int = 1,
        more: Mapping[str, Sequence[Layer]] | None = None,
        sequence: int = 7,
        bootkit: str = "out/bootkit",
    ) -> Path:
        """Publish a manifest with this hostfs and a UKI's bootkit; `more` names `fs-only` targets.

        Without a hostfs the image lies there already; it is a large one, whose layers are kept converted.
        """
        keyset = keyset or self.keyset
        cache = images.open_cache(self.host) if hostfs is None else None
        if hostfs is not None:
            self.image(f"{name}-hostfs", *([hostfs] if isinstance(hostfs, dict) else hostfs))
        for service, layers in (more or {}).items():
            self.image(f"{name}-{service}", *layers)
        lines = [
            "version: 1",
            f"product: {keyset.product}",
            f"sequence: {sequence}",
            f"epoch: {epoch}",
            "update_type: complete",
        ]
        lines += ["targets:"]
        targets = [("hostfs", "hostfs", f"{name}-hostfs"), ("bootkit", "bootkit", bootkit)]
        targets += [(service, "fs-only", f"{name}-{service}") for service in more or {}]
        for service, kind, source in targets:
            lines += [
                f"  - service_name: {service}",
                f"    service_type: {kind}",
                f"    source: oci:./{source}",
            ]
            lines += ["    version: '1'"]
        written = self.folder / f"{name}.yaml"
        written.write_text("\n".join(lines) + "\n")
        publish.publish(self.host, written, keyset, f"oci:{self.folder / name}", cache=cache)
        return self.folder / name

    def medium(self, release: Path) -> Path:
        """Seal a release with the valid layer key and make a medium of it."""
        target = self.folder / f"{release.name}.raw"
        disk.live_medium(self.host, self.bootable.ukis["live"].path, release, self.keyset, target)
        with target.open("r+b") as file:
            file.truncate(SIZE)
        return target

    def save(self, medium: Path) -> None:
        """Save the machine, once, that serves all tests with other content of the medium."""
        if not self.cold:
            self.saved = vm.save(self.host, self.options(medium), self.folder / "saved").folder

    def options(self, medium: Path, **more: object) -> vm.BootOptions:
        """Return how to boot a medium up to the end of the bring-up."""
        plain = vm.BootOptions(
            disk=medium,
            folder=self.folder / f"{medium.stem}.state",
            keys=self.keyset.folder,
            until="pivoted",
            timeout=240,
            hardware=Hardware(snapshot=True),
        )
        return replace(plain, **more)  # type: ignore[arg-type]

    def go_on(self, medium: Path, **more: object) -> vm.Outcome:
        """Let the saved machine go on with another medium; with --cold, boot it from power-on."""
        if self.cold or self.saved is None:
            return vm.boot(self.host, self.options(medium, **more))
        return vm.restore(self.host, self.saved, self.options(medium, **more))


def make_tar(files: Files) -> bytes:
    """Make a tar of these files, all of them programs."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return tar.getvalue()


def put_stacker(host: Host, layout: Path, layer: Stacker) -> dict[str, object]:
    """Write a layer as stacker does into an OCI layout and return its descriptor."""
    with host.scratch() as folder:
        for path, content in layer.files.items():
            target = folder / "root" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(0o755)
        blob, marks = folder / "layer", []
        for path in layer.hidden:
            (folder / "root" / path).parent.mkdir(parents=True, exist_ok=True)
            marks += ["-p", f"{path} c 0 0 0 0 0"]
        host.run(["mksquashfs", folder / "root", blob, "-comp", layer.compressor, *marks, "-quiet"])
        size = blob.stat().st_size
        told = host.run(
            ["veritysetup", "format", "--data-block-size=4096", "--hash-block-size=4096",
             f"--data-blocks={size // 4096}", f"--hash-offset={size}", blob, blob]
        ).decode()  # fmt: skip
        root_hash = next(line.split()[-1] for line in told.splitlines() if line.startswith("Root hash"))
        kind = f"application/vnd.stacker.image.layer.squashfs+{layer.compressor}+verity"
        return put(layout, blob.read_bytes(), kind) | {"annotations": {layer.annotation: root_hash}}


def make_cpio(host: Host, files: Files) -> bytes:
    """Make an initrd of these files and the folders they lie in."""
    with host.scratch() as folder:
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        listed = "".join(f"{name}\n" for name in names).encode()
        return host.run(["cpio", "--create", "--format=newc", "--quiet"], stdin=listed, cwd=folder)


def put(layout: Path, content: bytes, kind: str) -> dict[str, object]:
    """Write a blob into an OCI layout and return its descriptor."""
    digest = hashlib.sha256(content).hexdigest()
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / digest).write_bytes(content)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}


def get(layout: Path, digest: str) -> bytes:
    """Read a blob of an OCI layout."""
    return (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()


def part_of(release: Path, kind: str) -> bytes:
    """Return one part of a release's install artefact."""
    index = json.loads(
        get(release, json.loads((release / "index.json").read_bytes())["manifests"][0]["digest"])
    )
    artefact = json.loads(get(release, index["manifests"][0]["digest"]))
    return next(get(release, part["digest"]) for part in artefact["layers"] if part["mediaType"] == kind)


def retouch(release: Path, name: str, kind: str, change: Callable[[bytes], bytes]) -> Path:
    """Copy a release and change one part of its install artefact; every digest above it fits again."""
    layout = release.parent / name
    shutil.copytree(release, layout)
    replace_parts(layout, {kind: change(part_of(release, kind))})
    return layout


def replace_parts(layout: Path, parts: Mapping[str, bytes]) -> None:
    """Give a release other parts of its install artefact, by media type; every digest above them fits."""
    top = json.loads((layout / "index.json").read_bytes())
    index = json.loads(get(layout, top["manifests"][0]["digest"]))
    artefact = json.loads(get(layout, index["manifests"][0]["digest"]))
    for number, part in enumerate(artefact["layers"]):
        if (kind := part["mediaType"]) in parts:
            artefact["layers"][number] = {**part, **put(layout, parts[kind], kind)}
    described = index["manifests"][0]
    index["manifests"][0] = {
        **described,
        **put(layout, json.dumps(artefact).encode(), described["mediaType"]),
    }
    top["manifests"][0] = {**top["manifests"][0], **put(layout, json.dumps(index).encode(), OCI_INDEX)}
    (layout / "index.json").write_text(json.dumps(top))


def flip(data: bytes, offset: int) -> bytes:
    """Flip one bit of a byte string."""
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def check_refused(outcome: vm.Outcome, check: str, *, fenced: bool = True) -> None:
    """Expect this check's refusal: exit status, framed report, screen, fence, no hand-over."""
    console = outcome.console.read_text(errors="replace")
    assert outcome.status == 3, f"{outcome.reason}\n{console[-3000:]}"
    report = outcome.report
    assert report is not None
    assert (report["result"], report["failed"], report["fenced"]) == ("refused", check, fenced)
    title, remedy = init.CHECKS[check]
    for words in (check, title, remedy, "mosinit does not start this machine"):
        assert words in console
    assert '"result": "pivoted"' not in console
    assert HELLO.decode().strip() not in console
    assert "passphrase" not in console.lower()


def check_closed(outcome: vm.Outcome, check: str, *, fenced: bool = True) -> str:
    """Expect that refusal, and that nothing of the machine was unsealed; return what the check has seen."""
    check_refused(outcome, check, fenced=fenced)
    assert outcome.report is not None
    checks: list[dict[str, object]] = outcome.report["checks"]  # type: ignore[assignment]
    stages: list[dict[str, object]] = outcome.report["stages"]  # type: ignore[assignment]
    passed = {str(each["id"]) for each in checks if each["ok"]}
    assert not {"TPM-POLICY", "VOLUME-IDENTITY", "VOLUME-KEY"} & passed
    assert not any(each["ok"] for each in stages if each["name"] in ("unlock", "open-volumes"))
    return str(next(each["seen"] for each in checks if each["id"] == check))


HELLO = b"hostfs says hello\n"
GOOD_HOSTFS = {"sbin/init": init_program(HELLO, "hang")}
