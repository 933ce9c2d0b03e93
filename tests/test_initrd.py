"""The initrd: what is in it, that nothing else is, and that it runs."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mosinit import init, initrd, keys, luks
from mosinit.host import Failure, Host
from mosinit.hostfs import KernelTree
from tests import volumes

Need = Callable[..., None]

TREE = Path(__file__).resolve().parent.parent
VERSION = "6.12.0-test"
MKOSI = TREE / "docs/mkosi.md"
ALLOWED = Path(__file__).with_name("initrd-allowed.txt")
SIGNED = b"module" + initrd.MODULE_SIGNATURE
TOOLS = ("cpio", "zstd", "unshare", "/usr/lib/python3/dist-packages/elftools")

# --- Kernel modules ---------------------------------------------------------------------------------

MODULES = {  # file: what it needs, all of it, in the order of depmod
    "drivers/md/dm-mod": "",
    "drivers/md/dm-bufio": "drivers/md/dm-mod",
    "drivers/md/dm-verity": "drivers/md/dm-bufio drivers/md/dm-mod",
    "lib/libcrc32c": "",
    "crypto/crc32c_generic": "",
    "fs/erofs/erofs": "lib/libcrc32c",
    "fs/squashfs/squashfs": "",
    "fs/overlayfs/overlay": "",
    "fs/efivarfs/efivarfs": "",
    "fs/unwanted/unwanted": "",
}


RUN_MODULES = {
    "fs/ext4/ext4": "", "crypto/xts": "", "crypto/authenc": "", "drivers/md/dm-crypt": "drivers/md/dm-mod",
    "drivers/md/dm-integrity": "drivers/md/dm-bufio drivers/md/dm-mod",
}  # fmt: skip


def make_tree(folder: Path, modules: dict[str, str] = MODULES, builtin: tuple[str, ...] = ("loop",)) -> Path:
    """Make a lib/modules/VERSION as depmod would, with stand-ins for the modules."""
    tree = folder / "modules" / VERSION

    def file(name: str) -> str:
        return f"kernel/{name}.ko.xz"

    for name in modules:
        path = tree / file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(name.encode() + SIGNED))
    lines = [f"{file(name)}: {' '.join(map(file, needs.split()))}\n" for name, needs in modules.items()]
    (tree / "modules.dep").write_text("".join(lines))
    (tree / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
    (tree / "modules.alias").write_text("alias crc32c crc32c_generic\nalias pci:v*d* unwanted\n")
    (tree / "modules.softdep").write_text("# comment\nsoftdep libcrc32c pre: crc32c post: unwanted\n")
    return tree


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    plan = [module.name for module in initrd.plan_modules(make_tree(tmp_path))]
    assert plan.index("dm_mod") < plan.index("dm_bufio") < plan.index("dm_verity")
    assert plan.index("crc32c_generic") < plan.index("libcrc32c") < plan.index("erofs")
    assert len(plan) == len(set(plan)) and "loop" not in plan and "unwanted" not in plan


def test_a_watchdog_is_armed_before_any_disk_is_looked_for(tmp_path: Path) -> None:
    drivers = {f"drivers/{name}": "" for name in initrd.DRIVER_MODULES}
    plan = [module.name for module in initrd.plan_modules(make_tree(tmp_path, {**MODULES, **drivers}))]
    watchdogs, disks = ("i6300esb", "iTCO_wdt"), initrd.BACKGROUND_MODULES
    assert max(map(plan.index, watchdogs)) < min(map(plan.index, disks))


def test_signatures_of_layers_are_demanded_by_a_parameter(tmp_path: Path) -> None:
    plan = {module.name: module for module in initrd.plan_modules(make_tree(tmp_path))}
    assert plan["dm_verity"].parameters == {"require_signatures": "Y"}


def test_a_kernel_without_a_needed_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no module loop"):
        initrd.plan_modules(make_tree(tmp_path, builtin=()))


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", __import__("gzip").compress)]
)
def test_modules_are_unpacked(
    tmp_path: Path, host: Host, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.ko{suffix}").write_bytes(pack(SIGNED))
    assert initrd.read_module(host, tmp_path, "a.ko") == SIGNED


def test_a_module_without_signature_is_refused(tmp_path: Path, host: Host) -> None:
    (tmp_path / "a.ko").write_bytes(b"module")
    with pytest.raises(Failure, match="not signed"):
        initrd.read_module(host, tmp_path, "a.ko")


def test_a_missing_module_file_is_refused(tmp_path: Path, host: Host) -> None:
    with pytest.raises(Failure, match="missing"):
        initrd.read_module(host, tmp_path, "a.ko")


# --- Formats ----------------------------------------------------------------------------------------


def test_policy_is_what_the_core_reads() -> None:
    modules = (initrd.KernelModule("dm_verity", "kernel/dm-verity.ko", {"require_signatures": "Y"}),)
    encoded = initrd.encode_policy(
        mode="live",
        product="p",
        epoch=2,
        kernel=VERSION,
        cmdline="a b --",
        db=["1", "2"],
        platform=["3"],
        modules=modules,
        revoked=["4"],
    )
    policy = init.parse_policy(encoded, b"id\n", {})
    module = init.Module(
        "dm_verity", f"/usr/lib/modules/{VERSION}/kernel/dm-verity.ko", {"require_signatures": "Y"}, False
    )
    assert policy == init.Policy(
        "live", "p", 2, VERSION, "a b --", ("1", "2"), ("3",), (module,), ("4",), "id", {}
    )


def test_cpio_agrees_on_the_device_nodes(host: Host, need: Need) -> None:
    need("cpio")
    listing = host.run(["cpio", "-tv", "--numeric-uid-gid"], stdin=initrd.device_nodes()).decode()
    seen = {line.split()[-1]: line.split() for line in listing.splitlines()}
    assert set(seen) == {"dev", *initrd.NODES}
    assert seen["dev/console"][0] == "crw-------" and seen["dev/null"][0] == "crw-rw-rw-"
    assert [word.strip(",") for word in seen["dev/kmsg"][2:6]] == ["0", "0", "1", "11"]


def test_cpio_unpacks_the_uki_id(host: Host, need: Need, tmp_path: Path) -> None:
    need("cpio")
    host.run(["cpio", "-id"], stdin=initrd.uki_id_archive("ab" * 32), cwd=tmp_path)
    assert (tmp_path / "etc/mosinit/uki-id").read_text() == "ab" * 32 + "\n"


def test_openssl_agrees_on_the_key_id(keyset: keys.Keyset, host: Host, need: Need) -> None:
    need("openssl")
    path = keyset.certificate_path("uki")
    shown = host.run(["openssl", "x509", "-in", path, "-noout", "-ext", "subjectKeyIdentifier"]).decode()
    assert initrd.key_id(keyset.certificate("uki")) == shown.splitlines()[1].strip().replace(":", "").lower()


# --- Libraries --------------------------------------------------------------------------------------


def test_ldd_agrees_on_the_libraries(need: Need, host: Host) -> None:
    need("ldd", "/usr/lib/python3/dist-packages/elftools")
    rust = next(Path(initrd.DIST_PACKAGES).glob("cryptography/hazmat/bindings/_rust*.so"))
    for path in (Path(os.path.realpath("/usr/bin/python3")), rust):
        opened = [initrd._library(name) for name in initrd.DLOPENED]
        shown = host.run(["ldd", path, *opened]).decode()
        expected = {Path(word).name for word in re.findall(r"(/\S+) \(0x", shown)}
        found = {Path(name).name for name in initrd.elf_closure([path])}
        assert found == expected | set(initrd.DLOPENED)


def test_a_library_search_path_is_refused(need: Need) -> None:
    need("/usr/lib/systemd/systemd-measure", "/usr/lib/python3/dist-packages/elftools")
    with pytest.raises(Failure, match="search path"):
        initrd.elf_closure([Path("/usr/lib/systemd/systemd-measure")])


# --- The whole --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A built initrd, its files unpacked, and what it was built from."""

    file: Path
    root: Path
    arguments: list[str]

    def run(self, script: str, *arguments: str, **environment: str) -> str:
        """Run a script inside, as the kernel runs /init: the same interpreter line, a bare environment."""
        (self.root / "probe").write_text(initrd.INIT.decode().splitlines()[0] + "\n" + script)
        (self.root / "probe").chmod(0o755)
        command = ["unshare", "--map-root-user", f"--root={self.root}", "/probe", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout


def unpack(file: Path, root: Path) -> None:
    """Unpack the files of an initrd; its device nodes, the archive before them, take privilege."""
    raw = subprocess.run(["zstd", "-dcq", file], capture_output=True, check=True).stdout
    files = raw[raw.index(b"TRAILER!!!") + 10 :].lstrip(b"\0")
    root.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet"], input=files, cwd=root, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, keyset: keys.Keyset, need: Need) -> Built:
    """The initrd of live mode."""
    need(*TOOLS)
    return build(tmp_path_factory.mktemp("initrd"), keyset, "live")


@pytest.fixture(scope="module")
def built_run(tmp_path_factory: pytest.TempPathFactory, keyset: keys.Keyset, need: Need) -> Built:
    """The initrd of run mode."""
    need(*TOOLS)
    return build(tmp_path_factory.mktemp("initrd"), keyset, "run")


def build(folder: Path, keyset: keys.Keyset, mode: str) -> Built:
    tree = make_tree(folder, {**MODULES, **RUN_MODULES})
    policy = initrd.encode_policy(
        mode=mode,
        product=keyset.product,
        epoch=1,
        kernel=VERSION,
        cmdline="--",
        db=[],
        platform=[],
        modules=initrd.plan_modules(tree, mode),
    )
    (folder / "policy.json").write_bytes(policy)
    options = {
        "kernel-modules": tree,
        "policy": folder / "policy.json",
        "organisation": keyset.folder,
        "level": 1,
        "out": folder / "initrd",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([TREE / "build-initrd.sh", *arguments], check=True, capture_output=True)
    unpack(folder / "initrd", folder / "root")
    return Built(folder / "initrd", folder / "root", arguments)


def test_two_builds_are_equal(built: Built, tmp_path: Path, need: Need) -> None:
    need("faketime")
    out = tmp_path / "other" / "place" / "initrd"
    out.parent.mkdir(parents=True)
    arguments = [*built.arguments[:-1], str(out)]
    elsewhere = {
        **os.environ,
        "TZ": "Asia/Tokyo",
        "HOME": str(tmp_path),
        "PYTHONHASHSEED": "7",
        "NO_FAKE_STAT": "1",  # faketime would show files' dates other than they are
    }
    command: list[str | Path] = ["faketime", "2031-05-06 07:08:09", TREE / "build-initrd.sh", *arguments]
    subprocess.run(command, check=True, capture_output=True, env=elsewhere, cwd=tmp_path, umask=0o077)
    assert out.read_bytes() == built.file.read_bytes()


def test_everything_is_roots_and_of_no_date(built: Built, host: Host) -> None:
    raw = host.run(["zstd", "-dcq", built.file])
    files = raw[raw.index(b"TRAILER!!!") + 10 :].lstrip(b"\0")
    for archive in (raw, files):
        for line in host.run(["cpio", "-tv", "--numeric-uid-gid"], stdin=archive).decode().splitlines():
            mode, _, owner, group, *rest = line.split()
            assert (owner, group) == ("0", "0") and "Jan  1  1970" in line
            assert mode[0] in "lc" or mode in ("drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--"), line


@pytest.mark.parametrize("mode", ["live", "run"])
def test_only_what_is_allowed_is_inside(mode: str, built: Built, built_run: Built) -> None:
    """A line too much or too few: look at why, then change tests/initrd-allowed.txt."""
    contents = Path(f"{(built_run if mode == 'run' else built).file}.contents").read_text().splitlines()
    lines = [line for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#")]
    more = [line.removeprefix("run ") for line in lines if line.startswith("run ")]
    allowed = {line for line in lines if not line.startswith("run ")} | {*(more if mode == "run" else [])}
    # The kernel here is a stand-in with few modules: those of a real one are checked by name alone.
    assert {line for line in contents if not line.startswith("module ")} == {
        line for line in allowed if not line.startswith("module ")
    }
    assert {line for line in contents if line.startswith("module ")} <= allowed


def test_modules_of_run_mode_are_not_in_live_mode(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {**MODULES, **RUN_MODULES})
    live, run = ({module.name for module in initrd.plan_modules(tree, mode)} for mode in ("live", "run"))
    assert run - live == {"ext4", "xts", "authenc", "dm_crypt", "dm_integrity"} and live < run
    with pytest.raises(Failure, match="no module ext4"):
        initrd.plan_modules(make_tree(tmp_path / "lacking"), "run")


def test_mke2fs_runs_inside(built_run: Built) -> None:
    """What it does to a device is the same to a file."""
    (built_run.root / "disk").write_bytes(bytes(16 << 20))
    (built_run.root / "proc/mounts").touch()
    script = "import mosinit\nmosinit.Kernel().format_ext4('/disk')\n"
    assert built_run.run(script) == ""
    image = (built_run.root / "disk").read_bytes()
    assert image[1024 + 56 : 1024 + 58] == b"\x53\xef"  # ext4's magic
    assert not image[1024 + 92] & 4  # EXT4_FEATURE_COMPAT_HAS_JOURNAL
    with pytest.raises(AssertionError, match="mke2fs ended with status"):
        built_run.run("import mosinit\nmosinit.Kernel().format_ext4('/missing')\n")
    (built_run.root / "disk").unlink()


def test_contents_are_the_whole_truth(built: Built) -> None:
    contents = Path(f"{built.file}.contents").read_text().splitlines()
    listed = {line.split(" ")[1] for line in contents if line.startswith("file ")}
    modules = {line.split(" ")[1] for line in contents if line.startswith("module ")}
    seen = {
        f"/{path.relative_to(built.root)}"
        for path in built.root.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name != "probe"
    }
    kernel = {place for place in seen if place.startswith("/usr/lib/modules/")}
    assert seen - kernel == listed
    assert {initrd.module_name(place) for place in kernel} == modules
    with zipfile.ZipFile(next(built.root.glob("usr/lib/python*.zip"))) as archive:
        inside = [re.sub(r"(/__init__)?\.pyc$", "", name).replace("/", ".") for name in archive.namelist()]
    assert sorted(inside) == [line.split(" ")[1] for line in contents if line.startswith("python ")]


def test_no_build_path_and_no_source_is_inside(built: Built) -> None:
    for path in (path for path in built.root.rglob("*") if path.is_file() and not path.is_symlink()):
        assert str(TREE).encode() not in path.read_bytes() and path.suffix != ".py"


def test_bytecode_is_taken_as_it_is(built: Built) -> None:
    with zipfile.ZipFile(next(built.root.glob("usr/lib/python*.zip"))) as archive:
        for name in archive.namelist():
            assert name.endswith(".pyc") and archive.read(name)[4:8] == b"\1\0\0\0"
            assert archive.getinfo(name).compress_type == zipfile.ZIP_STORED


def test_everything_the_core_names_can_be_imported(built: Built) -> None:
    script = """
import mosinit, os
mosinit.import_ahead()
import sys
print(*(name for name in mosinit.FROZEN_IMPORTS if name not in sys.modules))
"""
    assert built.run(script).strip() == ""


def test_manifests_are_verified_inside(built: Built, keyset: keys.Keyset) -> None:
    text = f"""version: 1
product: {keyset.product}
sequence: 1
epoch: 1
update_type: complete
storage: []
targets:
  - service_name: hostfs
    service_type: hostfs
    version: 1.0.0
    digest: sha256:{"0" * 64}
    size: 10
    layer_signatures: []
"""
    (built.root / "manifest").write_text(text)
    (built.root / "signature").write_bytes(keyset.signer("product").sign(text.encode()))
    shutil.copy(keyset.certificate_path("product"), built.root / "certificate")
    script = """
import mosinit
mosinit.import_ahead()
def read(name):
    with open(name, "rb") as file:
        return file.read()
names = ["manifest-ca.pem"]
ours = {name: read("/etc/mosinit/organisation/" + name) for name in names}
policy = mosinit.parse_policy(read("/etc/mosinit/policy.json"), b"", ours)
parts = read("/manifest"), read("/signature"), read("/certificate")
print(mosinit.verify_manifest(*parts, policy).contents.targets[0].service_name)
try:
    mosinit.verify_manifest(parts[0] + b" ", *parts[1:], policy)
except mosinit.Refused as refused:
    print(refused.check)
"""
    assert built.run(script).split() == ["hostfs", "MANIFEST-SIGNATURE"]


@pytest.mark.parametrize("module", ["ssl", "socket", "subprocess", "urllib.request", "inspect", "bcrypt"])
def test_nothing_else_can_be_imported(built: Built, module: str) -> None:
    assert built.run(f"try:\n    import {module}\nexcept ImportError:\n    print('absent')\n") == "absent\n"


def test_what_was_left_out_says_so(built: Built) -> None:
    script = """
from email.utils import parseaddr
try:
    parseaddr("a@b")
except ImportError as error:
    print(error)
"""
    assert built.run(script) == "email.utils.parseaddr is left out of the initrd\n"


def test_words_of_the_command_line_do_not_reach_the_interpreter(built: Built) -> None:
    script = "import sys\nprint(sys.path, sys.flags, sorted(sys.modules))\n"
    (built.root / "evil").mkdir(exist_ok=True)
    (built.root / "evil/sitecustomize.py").write_text("raise SystemExit('evil')\n")
    words = {
        "PYTHONPATH": "/evil",
        "PYTHONHOME": "/evil",
        "PYTHONSTARTUP": "/evil/sitecustomize.py",
        "PYTHONINSPECT": "1",
        "PYTHONVERBOSE": "1",
    }
    assert built.run(script, "-i", "single", "x=y", **words) == built.run(script)


def test_the_parts_add_up(built: Built) -> None:
    parts, packed = initrd.read_parts(Path(f"{built.file}.parts.json"))
    assert packed == built.file.stat().st_size
    assert abs(sum(part.compressed for part in parts) - packed) <= len(parts)
    files = [path for path in built.root.rglob("*") if path.is_file() and not path.is_symlink()]
    inside = [path for path in files if path.suffix != ".zip" and "evil" not in str(path)]
    assert sum(part.size for part in parts) > sum(
        path.stat().st_size for path in inside if path.parent != built.root
    )


def test_an_initrd_that_is_there_already_is_not_built_again(built: Built) -> None:
    before = built.file.stat()
    subprocess.run([TREE / "build-initrd.sh", *built.arguments], check=True, capture_output=True)
    assert built.file.stat() == before
    content = built.file.read_bytes()
    built.file.write_bytes(content[:-1])
    subprocess.run([TREE / "build-initrd.sh", *built.arguments], check=True, capture_output=True)
    assert built.file.read_bytes() == content


def test_a_policy_for_another_kernel_is_refused(built: Built, tmp_path: Path) -> None:
    policy = Path(built.arguments[built.arguments.index("--policy") + 1]).read_text()
    (tmp_path / "policy.json").write_text(policy.replace(VERSION, "6.1.0"))
    arguments = [*built.arguments, "--policy", f"{tmp_path}/policy.json", "--out", f"{tmp_path}/initrd"]
    done = subprocess.run(
        [TREE / "build-initrd.sh", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "not of the kernel" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


QUICK_ZSTD = """\
#!/bin/sh
for word; do
    shift
    [ "$word" != -19 ] || word=-1
    set -- "$@" "$word"
done
exec {} "$@"
"""


def test_a_build_leaves_what_makes_its_initrd_again(
    tmp_path: Path, host: Host, keyset: keys.Keyset, need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the words of docs/mkosi.md."""
    need(*TOOLS)
    # Who asks for the level of a release gets the quickest: any other is still another.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/zstd").write_text(QUICK_ZSTD.format(shutil.which("zstd")))
    (tmp_path / "bin/zstd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (words,) = re.findall(r"tools run (./build-initrd\.sh .*?)\n```", MKOSI.read_text(), re.DOTALL)
    tree = make_tree(tmp_path)
    (tmp_path / "out/kernel").mkdir(parents=True)
    tree.rename(tmp_path / "out/kernel" / VERSION)
    (tmp_path / "keys").symlink_to(keyset.folder)
    modules = tmp_path / "out/kernel" / VERSION
    kernel = KernelTree(VERSION, modules / "vmlinuz", modules)
    out = tmp_path / "out/live.cpio.zst"
    initrd.build(host, kernel, keyset, out, mode="live", epoch=1, cmdline="--")
    script = words.replace("./build-initrd.sh", str(TREE / "build-initrd.sh"))
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out/initrd.cpio.zst").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "unknown option --nonsense"),
        (["--out"], "--out wants a value"),
        (["--out", "x"], "missing"),
    ],
)
def test_wrong_usage_says_so(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [TREE / "build-initrd.sh", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and message in done.stderr


def test_a_volume_opens_inside(built_run: Built, host: Host, need: Need, tmp_path: Path) -> None:
    need("cryptsetup")
    header = luks.read_header(host, volumes.plain(host, tmp_path / "volume"), "plain")
    (built_run.root / "header").write_bytes(init.detached_header(header))
    # libcryptsetup wants both at its start; here they are files, as /dev is not mounted.
    sources = [built_run.root / "dev" / name for name in ("random", "urandom")]
    for source in sources:
        source.write_bytes(os.urandom(4096))
    script = f"""
import mosinit, os
kernel = mosinit.Kernel()
header = kernel.read("/header", 8 << 20)
# There is no /proc in here: a file stands where the one in memory would be.
number = os.memfd_create("luks")
os.makedirs("/proc/self/fd", exist_ok=True)
os.rename("/header", f"/proc/self/fd/{{number}}")
os.close(number)
kernel.open_luks(header, "/probe", bytearray({volumes.SECRET!r}), 0, None)
try:
    kernel.open_luks(header, "/probe", bytearray(32), 0, None)
except OSError as error:
    print(error.errno)
"""
    assert built_run.run(script).strip() == "1"
    shutil.rmtree(built_run.root / "proc/self")
    for source in sources:
        source.unlink()


def test_imports_take_no_longer_than_promised(built: Built) -> None:
    """In processor time, so that what else the machine does counts for nothing."""
    script = """
import time
start = time.process_time()
import mosinit
mosinit.import_ahead()
print(1000 * (time.process_time() - start))
"""
    best = min(float(built.run(script)) for _ in range(5))
    sys.stderr.write(f"imports: {best:.0f} ms\n")
    assert best < 170
