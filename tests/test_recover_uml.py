"""A recovery on a kernel with device-mapper: encryption and integrity are real. User Mode Linux has no TPM,
and no keyring for signatures of layers: those stand aside.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import init, install, layout
from mosinit.host import Host
from tests import installation, uml
from tests.installation import TOOLS
from tests.test_install_uml import BOOT, INSTALL

NEW_KEY = b"another recovery key"

RECOVER = """
import dataclasses, hashlib, json, pickle
from pathlib import Path
from mosinit import damage, install, recover, repository
for name in ("nls_cp437", "nls_ascii", "nls_iso8859-1", "vfat"):
    subprocess.run(["modprobe", "--set-version", os.uname().release, "--dirname", "/run/m", name])
options, old, new = pickle.loads(Path({needed!r}).read_bytes())
install.read_provisioned = lambda folder, policy: new
damage.look_at_tpm = lambda host, seen: dataclasses.replace(seen, tpm_fits=False)
class Recoverer(damage.Recoverer):
    def check_layer(self, machine, name, layer, signature):
        assert machine.exists(init.blob_path(layer.digest))
host = Recoverer()
def digests():
    found = []
    for number in (1, 2, 3, 5):
        done = hashlib.sha256()
        found.append(done)
        with open(f"/dev/ubda{{number}}", "rb") as file:
            while chunk := file.read(1 << 24):
                done.update(chunk)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return [done.hexdigest() for done in found]
os.chdir("/")
# Somebody's git packs, a copy of a header and the boot partition are damaged.
with host.opened(Path("/dev/ubda2"), "config", old.secret, "mosinit-damage") as device:
    with host.mounted(device, "ext4") as folder:
        git = ["git", "-c", "safe.directory=*", f"--git-dir={{folder}}/manifest.git"]
        run(*git, "gc", "--quiet")
        run(*git, "pack-refs", "--all")
for device, size in (("/dev/ubda1", 8 << 20), ("/dev/ubda3", 4096)):
    with open(device, "r+b", buffering=0) as file:
        file.write(bytes(size))
given = damage.Options(
    Path("/dev/ubda"), (old.recovery,), Path("/nonexistent"), left=options.left, loader=options.loader
)
before = digests()
seen = damage.look(host, given)
plan, after = damage.describe(seen), digests()
assert after == before, ("a plan that writes", [one == two for one, two in zip(before, after)])
done = recover.act(host, seen)
assert done["will do"] == plan["will do"], (plan, done)
assert done["left"] == [], done
again = damage.describe(damage.look(host, damage.Options(
    Path("/dev/ubda"), (new.recovery,), None, left=options.left, loader=options.loader
)))
assert again["found"] == [], again
assert not list(Path("/dev/mapper").glob("mosinit*"))
print(json.dumps(done["will do"]))
"""


def test_a_disk_is_given_to_a_new_tpm(
    need: Callable[..., None], host: Host, memory: Path, tmp_path: Path
) -> None:
    need("linux.uml", "e2fsck", "fsck.vfat", *TOOLS)
    made = installation.setting(host, tmp_path)
    disk = memory / "disk"
    with disk.open("wb") as file:
        file.truncate(layout.SMALLEST)
    options = installation.options(made, Path("/dev/ubda"), state=64 * init.MIB)
    needed = tmp_path / "needed"
    needed.write_bytes(pickle.dumps((options, made.provisioned)))
    uml.run(tmp_path, INSTALL.format(needed=str(needed)), [disk], 300)
    fresh = installation.make_provisioned(made.keyset, bytes(range(40, 72)))
    fresh = dataclasses.replace(fresh, recovery=NEW_KEY)
    assert isinstance(fresh, install.Provisioned)
    needed.write_bytes(pickle.dumps((options, made.provisioned, fresh)))
    printed = uml.run(tmp_path, RECOVER.format(needed=str(needed)), [disk], 300)
    for words in ("both copies of the header", "the new provisioning", "generation 7", "make its FAT anew"):
        assert words in printed[-1]
    needed.write_bytes(pickle.dumps((options, fresh)))
    policy = made.left / "policy.json"
    policy.write_text(policy.read_text().replace('"live"', '"run"'))
    program = BOOT.format(needed=str(needed), uki_id=installation.RUN_ID.encode())
    assert uml.run(tmp_path, program, [disk])[-1].endswith(" 7")
    # Nothing of before opens it.
    needed.write_bytes(pickle.dumps((options, made.provisioned)))
    with pytest.raises(AssertionError, match="VOLUME-KEY|AssertionError"):
        uml.run(tmp_path, program, [disk])
