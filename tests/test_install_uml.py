"""An installation on a kernel with device-mapper: encryption and integrity are real, only layers' signatures
are not checked, for which User Mode Linux has no keyring.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import init, layout
from mosinit.host import Host
from tests import installation, uml
from tests.installation import TOOLS

INSTALL = """
import pickle
from pathlib import Path
from mosinit import install
for name in ("nls_cp437", "nls_ascii", "nls_iso8859-1", "vfat"):
    subprocess.run(["modprobe", "--set-version", os.uname().release, "--dirname", "/run/m", name])
class Installer(install.Installer):
    def check_layer(self, machine, name, layer, signature):
        init.parse_verity_salt(b"", 0) if not machine.exists(init.blob_path(layer.digest)) else None
options, provisioned = pickle.loads(Path({needed!r}).read_bytes())
host = Installer()
planned, release, policy = install.plan(host, options)
done = install.act(host, planned, release, policy, provisioned, options.loader)
print(done["generation"])
"""

# As the bring-up goes about it, with the secret that its TPM would give.
BOOT = """
import contextlib, pickle
from pathlib import Path
options, provisioned = pickle.loads(Path({needed!r}).read_bytes())
for folder in (init.CONFIG, init.STORE, init.SCRATCH):
    os.makedirs(folder)
policy = init.parse_policy(
    (options.left / "policy.json").read_bytes(), {uki_id!r},
    {{path.name: path.read_bytes() for path in (options.left / "organisation").iterdir()}},
)
with contextlib.ExitStack() as owned:
    disk = init.BootDisk("ubda", init._read_gpt(k, "ubda"))
    fd, _ = init.open_partition(k, disk, init.CONFIG_TYPE)
    header, secret = init.read_luks_header(k, fd, "config"), bytearray(provisioned.secret)
    assert header.tokens == provisioned.tokens
    init.mount_volumes(k, init.open_volumes(k, disk, init.Config(fd, header, secret), owned))
    k.efi_read = lambda name, guid: None
    manifest = init.pick_generation(k, policy)
    for target in init.boot_targets(manifest.contents):
        init.parse_image(init.read_blob(k, target.digest, target.size, "IMAGE-DIGEST"))
    print(k.report.facts["generation"], manifest.contents.sequence)
"""

RECOVER = """
import pickle
from pathlib import Path
_, provisioned = pickle.loads(Path({needed!r}).read_bytes())
for number, folder in ((2, "config"), (3, "store"), (5, "state")):
    run("cryptsetup", "open", "--key-file", "-", f"/dev/ubda{{number}}", folder, data=provisioned.recovery)
    os.makedirs(f"/mnt/{{folder}}")
    k.mount(f"/dev/mapper/{{folder}}", f"/mnt/{{folder}}", "ext4")
    print(folder, *sorted(os.listdir(f"/mnt/{{folder}}")))
"""


@pytest.fixture
def uml_installed(
    need: Callable[..., None], host: Host, memory: Path, tmp_path: Path
) -> tuple[Path, Path, str]:
    """An installed disk, what it was made from, the generation."""
    need("linux.uml", *TOOLS)
    made = installation.setting(host, tmp_path)
    disk = memory / "disk"
    with disk.open("wb") as file:
        file.truncate(layout.SMALLEST)
    options = installation.options(made, Path("/dev/ubda"), state=64 * init.MIB)
    (tmp_path / "needed").write_bytes(pickle.dumps((options, made.provisioned)))
    printed = uml.run(tmp_path, INSTALL.format(needed=str(tmp_path / "needed")), [disk], 300)
    return disk, tmp_path / "needed", printed[-1]


def test_a_boot_opens_what_was_installed(uml_installed: tuple[Path, Path, str], tmp_path: Path) -> None:
    disk, needed, generation = uml_installed
    program = BOOT.format(needed=str(needed), uki_id=installation.RUN_ID.encode())
    # The policy is the live system's: what run mode's UKI would have is the same but for these.
    policy = needed.parent / "left/policy.json"
    policy.write_text(policy.read_text().replace('"live"', '"run"'))
    assert uml.run(tmp_path, program, [disk])[-1] == f"{generation} 7"
    recovered = uml.run(tmp_path, RECOVER.format(needed=str(needed)), [disk])
    assert recovered[-3:] == [
        "config lost+found manifest.git state sudi",
        "store lost+found mosinit",
        "state lost+found",
    ]


LEFT_OPEN = """
from pathlib import Path
from mosinit import install, luks
host, names = install.Installer(), []
for number, kind in enumerate(("plain", "config")):
    path, name = Path(f"/dev/ubd{'ab'[number]}"), f"mosinit-install-machine-{'store config'.split()[number]}"
    luks.format_volume(host, path, kind, f"00000000-0000-4000-8000-00000000000{number}", bytes(32))
    run("cryptsetup", "open", "--key-file", "-", path, name, data=bytes(32))
names = sorted(path.name for path in Path("/dev/mapper").glob(f"{install.OPENED}*"))
print(*names)
install._close(host, names)
print("left:", *names, run("dmsetup", "ls").decode().strip())
"""


def test_what_was_left_open_is_closed(need: Callable[..., None], memory: Path, tmp_path: Path) -> None:
    need("linux.uml", "cryptsetup", "dmsetup")
    disks = [memory / "store", memory / "config"]
    for path in disks:
        with path.open("wb") as file:
            file.truncate(64 * init.MIB)
    printed = uml.run(tmp_path, LEFT_OPEN, disks)
    opened = " ".join(f"mosinit-install-machine-{name}" for name in ("config", "config_dif", "store"))
    assert printed[-2:] == [opened, "left: No devices found"]
