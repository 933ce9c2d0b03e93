"""The UKI: exactly our parts, signed by the uki key, approved for one phase; what db accepts beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mosinit import approvals, images, init, initrd, keys, pe, uki
from mosinit.host import Failure, Host
from mosinit.hostfs import KernelTree

Need = Callable[..., None]

TREE = Path(__file__).resolve().parent.parent
VERSION = "6.12.0-test"
EPOCH = 3
EFI = Path("/usr/lib/systemd/boot/efi")
KERNEL = (
    EFI / "addonx64.efi.stub"
)  # stands in for a kernel: a small PE that is neither a UKI nor systemd-boot
MEASURE = "/usr/lib/systemd/systemd-measure"


@pytest.fixture
def kernel(tmp_path: Path, need: Need) -> KernelTree:
    need("ukify", "sbsign", "sbverify", "faketime", "zstd", "cpio", uki.STUB)
    modules = tmp_path / "modules" / VERSION
    (modules / "kernel").mkdir(parents=True)
    (modules / "kernel/a.ko").write_bytes(b"module")
    (modules / "build").symlink_to("/usr/src/linux")
    shutil.copy(KERNEL, modules / "vmlinuz")
    return KernelTree(VERSION, modules / "vmlinuz", modules)


def make_initrd(host: Host, folder: Path, mode: str, keyset: keys.Keyset) -> initrd.Initrd:
    """Make an initrd that holds a policy and no more; its length is not a multiple of four."""
    policy = initrd.encode_policy(
        mode=mode,
        product=keyset.product,
        epoch=EPOCH,
        kernel=VERSION,
        cmdline=uki.CMDLINE,
        db=[initrd.fingerprint(keyset.certificate(role)) for role in ("uki", "layer")],
        platform=[],
        modules=[],
    )
    files = {
        "etc/mosinit/policy.json": policy,
        "etc/mosinit/organisation/manifest-ca.pem": keyset.certificate_path("manifest-ca").read_bytes(),
    }
    entries = [(name, stat.S_IFREG | 0o644, data, (0, 0)) for name, data in files.items()]
    folders = [
        ("etc", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("etc/mosinit", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("etc/mosinit/organisation", stat.S_IFDIR | 0o755, b"", (0, 0)),
    ]
    raw = initrd.device_nodes() + initrd.encode_cpio([*folders, *entries])
    packed = host.run(["zstd", "-cq"], stdin=raw)
    path = folder / f"{mode}.initrd"
    skippable = b"\x50\x2a\x4d\x18" + (5 - len(packed) % 4).to_bytes(4, "little")
    path.write_bytes(skippable + bytes(5 - len(packed) % 4) + packed)
    assert path.stat().st_size % 4 == 1
    return initrd.Initrd(path, mode, ())


@pytest.fixture
def live(host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset) -> uki.Uki:
    return uki.build(
        host, kernel, make_initrd(host, tmp_path, "live", keyset), keyset, tmp_path / "live.efi"
    )


@pytest.fixture
def run(host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset) -> uki.Uki:
    return uki.build(host, kernel, make_initrd(host, tmp_path, "run", keyset), keyset, tmp_path / "run.efi")


def sections(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    image = pe.parse(data)
    return {name: image.section(data, name) for name in image.names}


# --- What is in it ----------------------------------------------------------------------------------


def test_sections_are_what_was_asked_for(live: uki.Uki, kernel: KernelTree, tmp_path: Path) -> None:
    found = sections(live.path)
    assert found[".cmdline"].decode() == uki.CMDLINE
    assert found[".linux"] == kernel.vmlinuz.read_bytes()
    assert found[".uname"].decode() == VERSION
    assert b'ID="mosinit"' in found[".osrel"]
    assert found[".initrd"].startswith((tmp_path / "live.initrd").read_bytes())
    assert set(found) == {*uki.CONTENT, *uki.STUB_SECTIONS}


def test_pefile_agrees_on_the_sections(live: uki.Uki) -> None:
    pefile = pytest.importorskip("pefile")
    for section in pefile.PE(str(live.path)).sections:
        name = section.Name.rstrip(b"\0").decode()
        size = min(section.Misc_VirtualSize, section.SizeOfRawData)
        assert sections(live.path)[name] == section.get_data(length=size)[:size], name


def test_revocation_data_of_the_stub_are_kept(live: uki.Uki) -> None:
    assert b"systemd-stub,1," in sections(live.path)[".sbat"]


def test_the_id_is_over_kernel_command_line_os_release_and_initrd(live: uki.Uki, tmp_path: Path) -> None:
    found = sections(live.path)
    parts = [found[".linux"], found[".cmdline"], found[".osrel"], (tmp_path / "live.initrd").read_bytes()]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert live.uki_id == hashlib.sha256(digests).hexdigest()


def test_the_kernel_will_find_the_id(live: uki.Uki, host: Host, tmp_path: Path) -> None:
    main = (tmp_path / "live.initrd").stat().st_size
    rest = sections(live.path)[".initrd"][main:]
    padding = len(rest) - len(rest.lstrip(b"\0"))
    assert padding == 3 and (main + padding) % 4 == 0
    (tmp_path / "unpacked").mkdir()
    host.run(["cpio", "-id"], stdin=rest[padding:], cwd=tmp_path / "unpacked")
    assert (tmp_path / "unpacked/etc/mosinit/uki-id").read_text().strip() == live.uki_id


def test_two_builds_are_equal(
    live: uki.Uki, host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset
) -> None:
    (tmp_path / "other").mkdir()
    initrd_again = make_initrd(host, tmp_path / "other", "live", keyset)
    again = uki.build(host, kernel, initrd_again, keyset, tmp_path / "other/live.efi")
    assert again.path.read_bytes() == live.path.read_bytes() and again.uki_id == live.uki_id


# --- Who signs what ---------------------------------------------------------------------------------


def test_sbverify_accepts_the_uki_and_not_the_kernel_in_it(
    live: uki.Uki, host: Host, keyset: keys.Keyset, tmp_path: Path
) -> None:
    host.run(["sbverify", "--cert", keyset.certificate_path("uki"), live.path])
    (tmp_path / "kernel").write_bytes(sections(live.path)[".linux"])
    for role in ("uki", "layer"):
        with pytest.raises(Failure):
            host.run(["sbverify", "--cert", keyset.certificate_path(role), tmp_path / "kernel"])


def test_live_carries_no_approval(live: uki.Uki) -> None:
    assert not set(sections(live.path)) & {".pcrsig", ".pcrpkey"}


def pcr_11(host: Host, path: Path, phase: str, folder: Path) -> str:
    """Ask systemd-measure for PCR 11 of a UKI at the end of a phase."""
    words = [MEASURE, "calculate", "--bank=sha256", "--json=short", f"--phase={phase}"]
    for name, content in sections(path).items():
        if name in (".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat", ".pcrpkey"):
            (folder / f"measured{name}").write_bytes(content)
            words.append(f"--{name[1:]}={folder}/measured{name}")
    value = json.loads(host.run(words))["sha256"][0]["hash"]
    assert isinstance(value, str)
    return value


def test_systemd_measure_agrees_on_what_is_approved(
    run: uki.Uki, host: Host, need: Need, keyset: keys.Keyset, tmp_path: Path
) -> None:
    need(MEASURE, "openssl")
    pcr11 = bytes.fromhex(pcr_11(host, run.path, "enter-initrd", tmp_path))
    assert approvals.predict_pcr11(run.path.read_bytes()) == pcr11
    assert pcr11 != bytes.fromhex(pcr_11(host, run.path, "enter-initrd:leave-initrd", tmp_path))
    approval, policies = approval_of(run), approvals.policy_keys(keyset)
    assert approval.epoch == EPOCH
    signed = (
        (approval.unseal, policies.uki_policy(pcr11, EPOCH, init.Cc.UNSEAL) + b"mosinit-uki"),
        (approval.set_epoch, policies.uki_policy(pcr11, EPOCH, init.Cc.NV_SETBITS) + b"mosinit-uki"),
    )
    verify: list[str | Path] = ["openssl", "dgst", "-sha256", "-verify", keyset.public_path("pcr")]
    for signature, data in signed:
        (tmp_path / "signature").write_bytes(signature)
        host.run([*verify, "-signature", tmp_path / "signature"], stdin=data)


def approval_of(made: uki.Uki) -> init.UkiApproval:
    return init.parse_uki_approval(sections(made.path)[".pcrsig"])


def test_the_approval_is_all_that_run_mode_adds(run: uki.Uki, keyset: keys.Keyset) -> None:
    """The stub would measure a .pcrpkey; the keys that approve are in the initrd."""
    assert set(sections(run.path)) == {*uki.CONTENT, *uki.STUB_SECTIONS, ".pcrsig"}
    assert uki.kind(run.path.read_bytes(), pe.parse(run.path.read_bytes())) == "UKI"
    data = sections(run.path)[".pcrsig"]
    assert data == approvals.approve_uki(keyset, run.path.read_bytes(), EPOCH)


def test_the_initrds_own_policy_decides_what_is_approved(
    host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset
) -> None:
    lying = replace(make_initrd(host, tmp_path, "live", keyset), mode="run")
    made = uki.build(host, kernel, lying, keyset, tmp_path / "uki.efi")
    assert ".pcrsig" not in sections(made.path)


def test_below_the_epoch_of_the_keyset_nothing_is_approved(
    host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset
) -> None:
    packed = make_initrd(host, tmp_path, "run", keyset)
    with pytest.raises(init.Refused, match="EPOCH"):
        uki.build(host, kernel, packed, replace(keyset, epoch=EPOCH + 1), tmp_path / "uki.efi")
    assert not (tmp_path / "uki.efi").exists()


def test_another_command_line_is_not_approved(
    host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset
) -> None:
    with pytest.raises(Failure, match="not approved"):
        run_initrd = make_initrd(host, tmp_path, "run", keyset)
        uki.build(host, kernel, run_initrd, keyset, tmp_path / "uki.efi", "init=/bin/sh --")
    assert not (tmp_path / "uki.efi").exists()


@pytest.mark.parametrize("policy", [b"", b"[]", b"{}", b'{"mode": "run"}'])
def test_an_initrd_without_our_policy_makes_no_uki(
    host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset, policy: bytes
) -> None:
    made = make_initrd(host, tmp_path, "run", keyset)
    archive = initrd.encode_cpio(
        [("etc", stat.S_IFDIR | 0o755, b"", (0, 0)), ("etc/mosinit", stat.S_IFDIR | 0o755, b"", (0, 0))]
        + [(f"etc/mosinit/{name}", stat.S_IFREG | 0o644, policy, (0, 0))
           for name in ("policy.json", "manifest-ca.pem")]
    )  # fmt: skip
    made.path.write_bytes(host.run(["zstd", "-cq"], stdin=initrd.device_nodes() + archive))
    with pytest.raises(Failure, match="not one of mosinit's"):
        uki.build(host, kernel, made, keyset, tmp_path / "uki.efi")


# --- UKIs that another tool put together ------------------------------------------------------------


def elsewhere(host: Host, content: uki.Content, folder: Path, *more: str) -> Path:
    """Put a UKI together as mkosi does: no id, nothing signed."""
    for name in ("kernel", "initrd", "osrel"):
        (folder / f"their-{name}").write_bytes(getattr(content, name))
    host.run(
        ["ukify", "build", f"--linux={folder}/their-kernel", f"--initrd={folder}/their-initrd",
         f"--os-release=@{folder}/their-osrel", f"--cmdline={content.cmdline.decode()}",
         f"--uname={content.uname.decode()}", f"--stub={uki.STUB}", f"--output={folder}/their.efi", *more]
    )  # fmt: skip
    return folder / "their.efi"


@pytest.fixture
def content(host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset) -> uki.Content:
    return uki.Content(
        kernel.vmlinuz.read_bytes(),
        uki.CMDLINE.encode(),
        uki.os_release("live"),
        VERSION.encode(),
        make_initrd(host, tmp_path, "live", keyset).path.read_bytes(),
    )


def test_signing_anothers_uki_gives_ours(
    host: Host, tmp_path: Path, content: uki.Content, live: uki.Uki, keyset: keys.Keyset
) -> None:
    signed = uki.sign(
        host, elsewhere(host, content, tmp_path), tmp_path / "live.initrd", keyset, tmp_path / "signed.efi"
    )
    assert signed.uki_id == live.uki_id
    assert signed.path.read_bytes() == live.path.read_bytes()


def test_mkosi_makes_the_same_uki_without_a_key(
    host: Host, need: Need, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset, live: uki.Uki
) -> None:
    need("mkosi", "bootctl")
    shutil.copytree(TREE / "mkosi.uki", tmp_path / "mkosi.uki")
    (tmp_path / "out/kernel" / VERSION).mkdir(parents=True)
    shutil.copy(kernel.vmlinuz, tmp_path / "out/kernel" / VERSION / "vmlinuz")
    shutil.copy(tmp_path / "live.initrd", tmp_path / "out/live.cpio.zst")
    host.run(["mkosi", "--directory", tmp_path / "mkosi.uki", "--force", "build"], timeout=100)
    signed = uki.sign(
        host, tmp_path / "out/mkosi/mosinit.efi", tmp_path / "live.initrd", keyset, tmp_path / "signed.efi"
    )
    assert signed.path.read_bytes() == live.path.read_bytes()


def test_a_signed_uki_is_not_signed_again(
    host: Host, tmp_path: Path, keyset: keys.Keyset, live: uki.Uki, run: uki.Uki
) -> None:
    """That of run mode has one more section, of which nobody is to be told first."""
    for made in (live, run):
        initrd_of = tmp_path / f"{made.path.stem}.initrd"
        with pytest.raises(Failure, match="is signed already: name the UKI that mkosi or ukify made"):
            uki.sign(host, made.path, initrd_of, keyset, tmp_path / "signed.efi")
    assert not (tmp_path / "signed.efi").exists()


def test_an_unknown_section_is_not_signed(
    host: Host, tmp_path: Path, content: uki.Content, keyset: keys.Keyset
) -> None:
    theirs = elsewhere(host, content, tmp_path, "--section=.dtb:hello")
    with pytest.raises(Failure, match="must not have: .dtb"):
        uki.sign(host, theirs, tmp_path / "live.initrd", keyset, tmp_path / "signed.efi")
    assert not (tmp_path / "signed.efi").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cmdline", b"init=/bin/sh --", "command line"),
        ("uname", b"6.1.0", "kernel"),
        ("initrd", b"not an initrd", "initrd"),
    ],
)
def test_what_does_not_fit_the_initrd_is_not_signed(
    host: Host,
    tmp_path: Path,
    content: uki.Content,
    keyset: keys.Keyset,
    field: str,
    value: bytes,
    message: str,
) -> None:
    theirs = elsewhere(host, replace(content, **{field: value}), tmp_path)
    with pytest.raises(Failure, match=message):
        uki.sign(host, theirs, tmp_path / "live.initrd", keyset, tmp_path / "signed.efi")


def test_an_initrd_for_another_keyset_is_not_signed(
    host: Host, tmp_path: Path, content: uki.Content, other: keys.Keyset
) -> None:
    theirs = elsewhere(host, content, tmp_path)
    with pytest.raises(Failure, match="for another keyset"):
        uki.sign(host, theirs, tmp_path / "live.initrd", other, tmp_path / "signed.efi")


@pytest.mark.parametrize("data", [b"", b"MZ", bytes(100), b"MZ" + bytes(58) + b"\x40\0\0\0PE\0\0"])
def test_what_is_no_uki_is_not_signed(host: Host, tmp_path: Path, keyset: keys.Keyset, data: bytes) -> None:
    (tmp_path / "their.efi").write_bytes(data)
    with pytest.raises(Failure, match="not a UKI"):
        uki.sign(host, tmp_path / "their.efi", tmp_path / "their.efi", keyset, tmp_path / "signed.efi")


# --- Nothing that db accepts starts an operating system without the stub -----------------------------


@pytest.fixture
def certificates(keyset: keys.Keyset) -> list[Path]:
    return [keyset.certificate_path(role) for role in ("uki", "layer")]


def boot_loader(keyset: keys.Keyset, folder: Path) -> Path:
    keyset.signer("uki").sign_pe(EFI / "systemd-bootx64.efi", folder / "systemd-boot.efi")
    return folder / "systemd-boot.efi"


def test_ukis_and_systemd_boot_may_be_signed(
    host: Host, live: uki.Uki, keyset: keys.Keyset, certificates: list[Path], tmp_path: Path
) -> None:
    paths = [live.path, boot_loader(keyset, tmp_path), KERNEL]
    found = {
        (binary.kind, binary.accepted) for binary in uki.check_signed_binaries(host, paths, certificates)
    }
    assert found == {("UKI", True), ("other", False), ("systemd-boot", True)}


def signed_kernel(keyset: keys.Keyset, folder: Path, role: str) -> Path:
    keyset.signer(role).sign_pe(KERNEL, folder / "signed-kernel")
    return folder / "signed-kernel"


def plain(host: Host, kernel: Path, folder: Path) -> Path:
    return kernel.rename(folder / "output" / "vmlinuz")


def in_uki(host: Host, kernel: Path, folder: Path) -> Path:
    """Put it into a UKI that is itself as it should be."""
    (folder / "initrd").write_bytes(b"initrd")
    host.run(
        ["ukify", "build", f"--linux={kernel}", f"--initrd={folder}/initrd", "--cmdline=--", "--uname=1",
         "--os-release=ID=x", f"--output={folder}/uki.efi"]
    )  # fmt: skip
    kernel.unlink()
    keyset = keys.open_keyset(host, folder / "keyset")
    keyset.signer("uki").sign_pe(folder / "uki.efi", folder / "output/uki.efi")
    return folder / "output/uki.efi"


def test_a_signed_kernel_is_not_built_into_a_uki(
    host: Host, tmp_path: Path, kernel: KernelTree, keyset: keys.Keyset
) -> None:
    tree = replace(kernel, vmlinuz=signed_kernel(keyset, tmp_path, "layer"))
    with pytest.raises(Failure, match="neither a UKI nor systemd-boot"):
        uki.build(host, tree, make_initrd(host, tmp_path, "live", keyset), keyset, tmp_path / "uki.efi")
    assert not (tmp_path / "uki.efi").exists()


def in_fat(host: Host, kernel: Path, folder: Path) -> Path:
    """Put it into a FAT image in two pieces: something else lies between."""
    image = folder / "output/esp.img"
    image.write_bytes(bytes(1 << 20))
    (folder / "gap").write_bytes(bytes(512))
    host.run(["mkfs.fat", "-s1", "-S512", image])
    for name in ("a", "b"):
        host.run(["mcopy", "-i", image, folder / "gap", f"::{name}"])
    host.run(["mdel", "-i", image, "::a"])
    host.run(["mcopy", "-i", image, kernel, "::kernel"])
    assert kernel.read_bytes() not in image.read_bytes()
    return image


def in_disk(host: Host, kernel: Path, folder: Path) -> Path:
    esp = in_fat(host, kernel, folder).rename(folder / "esp.img")
    image = folder / "output/disk.img"
    image.write_bytes(bytes(4 << 20))
    host.run(["sfdisk", "-q", image], stdin=b"label: gpt\nstart=2048, size=2048, type=U\n")
    with image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(esp.read_bytes())
    return image


def in_erofs(host: Host, kernel: Path, folder: Path) -> Path:
    (folder / "tree/boot").mkdir(parents=True)
    kernel.rename(folder / "tree/boot/vmlinuz")
    image = folder / "output/layer.erofs"
    host.run(["mkfs.erofs", "-zlz4hc", "-C65536", "-Eztailpacking", image, folder / "tree"])
    assert (folder / "tree/boot/vmlinuz").read_bytes() not in image.read_bytes()
    return image


def in_squashfs(host: Host, kernel: Path, folder: Path) -> Path:
    shutil.move(in_erofs(host, kernel, folder), folder / "not-this")
    host.run(["mksquashfs", folder / "tree", folder / "output/layer.squashfs", "-quiet", "-no-progress"])
    return folder / "output"


def in_tar_zst(host: Host, kernel: Path, folder: Path) -> Path:
    shutil.move(in_erofs(host, kernel, folder), folder / "not-this")
    host.run(["tar", "--zstd", "-cf", folder / "output/layer.tar.zst", "-C", folder, "tree"])
    return folder / "output"


@pytest.mark.parametrize("hide", [plain, in_uki, in_fat, in_disk, in_erofs, in_squashfs, in_tar_zst])
@pytest.mark.parametrize("role", ["uki", "layer"])
def test_a_signed_kernel_is_found(
    host: Host,
    need: Need,
    keyset: keys.Keyset,
    kernel: KernelTree,
    certificates: list[Path],
    tmp_path: Path,
    role: str,
    hide: Callable[[Host, Path, Path], Path],
) -> None:
    need("mcopy", "mkfs.fat", "sfdisk", "mkfs.erofs", "fsck.erofs")
    (tmp_path / "output").mkdir()
    (tmp_path / "keyset").symlink_to(keyset.folder)
    hide(host, signed_kernel(keyset, tmp_path, role), tmp_path)
    with pytest.raises(Failure, match="neither a UKI nor systemd-boot"):
        uki.check_signed_binaries(host, [tmp_path / "output"], certificates)


def test_what_only_begins_like_a_pe_hides_none() -> None:
    real = KERNEL.read_bytes()
    decoys = [b"MZ", b"MZ" + bytes(70), b"MZ" + bytes(58) + b"\x40\0\0\0PE\0\0" + bytes(30)]
    data = b"".join(decoys) + real + b"MZ"
    assert [image.offset for image in pe.find(data)] == [sum(map(len, decoys))]


def test_a_kernel_signed_by_somebody_else_is_none_of_dbs(
    host: Host, kernel: KernelTree, other: keys.Keyset, certificates: list[Path], tmp_path: Path
) -> None:
    signed = signed_kernel(other, tmp_path, "uki")
    assert not any(binary.accepted for binary in uki.check_signed_binaries(host, [signed], certificates))


def test_a_uki_without_command_line_is_no_uki(
    host: Host, kernel: KernelTree, certificates: list[Path], keyset: keys.Keyset, tmp_path: Path
) -> None:
    """The stub would take the command line from outside."""
    command = ["ukify", "build", f"--linux={kernel.vmlinuz}", f"--uname={VERSION}", "--os-release=ID=x"]
    host.run([*command, f"--initrd={kernel.vmlinuz}", f"--output={tmp_path}/bare.efi"])
    keyset.signer("uki").sign_pe(tmp_path / "bare.efi", tmp_path / "signed.efi")
    with pytest.raises(Failure, match="neither"):
        uki.check_signed_binaries(host, [tmp_path / "signed.efi"], certificates)


# --- The bootkit ------------------------------------------------------------------------------------


def test_the_bootkit_is_an_image_that_the_core_reads(
    host: Host, need: Need, tmp_path: Path, kernel: KernelTree, live: uki.Uki, run: uki.Uki
) -> None:
    need("mkfs.erofs", "fsck.erofs", "veritysetup", "skopeo")
    layout = images.Layout(tmp_path / "bootkit")
    descriptor = uki.bootkit(host, kernel, {"run": run, "live": live}, layout)
    document = layout.read_blob(descriptor)
    image = init.parse_image(document)
    assert image.uki_ids == {"run": run.uki_id, "live": live.uki_id} and len(image.layers) == 1
    layer = layout.blob_path(image.layers[0].digest)
    images.check_layer(host, layer, image.layers[0].root_hash)
    host.run(["fsck.erofs", f"--extract={tmp_path}/tree", layer])
    assert (tmp_path / "tree/usr/lib/modules" / VERSION / "kernel/a.ko").read_bytes() == b"module"
    assert host.run(["skopeo", "inspect", "--raw", f"oci:{layout.path}"]) == document
    assert run.path.read_bytes() in [path.read_bytes() for path in layout.path.glob("blobs/sha256/*")]


def test_publishing_keeps_the_bootkit_as_it_is(
    host: Host, need: Need, tmp_path: Path, kernel: KernelTree, live: uki.Uki
) -> None:
    need("mkfs.erofs", "veritysetup")
    descriptor = uki.bootkit(host, kernel, {"run": live}, images.Layout(tmp_path / "bootkit"))
    again = uki.bootkit(host, kernel, {"run": live}, images.Layout(tmp_path / "again"))
    converted = images.convert(host, f"oci:{tmp_path}/bootkit", images.Layout(tmp_path / "release"))
    assert converted.manifest.digest == descriptor.digest == again.digest


def test_modules_are_copied_without_kernel_and_links(kernel: KernelTree, tmp_path: Path) -> None:
    uki.copy_modules(kernel.modules, tmp_path / "root/usr/lib/modules" / VERSION)
    files = {
        str(path.relative_to(tmp_path / "root")) for path in (tmp_path / "root").rglob("*") if path.is_file()
    }
    assert files == {f"usr/lib/modules/{VERSION}/kernel/a.ko"}
    assert all(path.stat().st_mtime == 0 for path in (tmp_path / "root").rglob("*"))
