"""A kernel with device-mapper in a process: User Mode Linux, whose root is the folder tree of this process.

It has what a build host's kernel may lack (dm-crypt, dm-integrity) and boots in a second; it has no TPM, no
firmware, and no keyring that signatures of layers could be checked against.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# In this order: dm-crypt asks for ciphers by name, and nobody here would load them then.
MODULES = (
    "crypto_null", "hmac", "ecb", "cbc", "xts", "authenc", "dm-integrity", "dm-crypt", "dm-verity", "loop",
    "overlay", "erofs",
)  # fmt: skip
PROLOGUE = """#!/usr/bin/python3 -B
import os, subprocess, sys, traceback
sys.path.insert(0, {checkout!r})
os.environ.update(PATH="/usr/sbin:/usr/bin", DM_DISABLE_UDEV="1", LC_ALL="C.UTF-8")
def run(*words, data=b"", fails=False):
    done = subprocess.run([str(word) for word in words], input=data, capture_output=True)
    assert (done.returncode != 0) == fails, (words, done.stdout, done.stderr)
    return done.stdout
try:
    from mosinit import init
    k = init.Machine()
    # Its kernel mounts /dev by itself.
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("tmpfs", "/mnt")):
        k.mount(kind, place, kind, init.MountFlag(0))
    # A root of its own, in memory: folders may be made in it, and the host's are where they were.
    os.mkdir("/mnt/root")
    for name in os.listdir("/"):
        if os.path.islink(f"/{{name}}"):
            os.symlink(os.readlink(f"/{{name}}"), f"/mnt/root/{{name}}")
        elif os.path.isdir(f"/{{name}}") and name != "mnt":
            os.mkdir(f"/mnt/root/{{name}}")
            k.mount(f"/{{name}}", f"/mnt/root/{{name}}", "", init.MountFlag.BIND | init.MountFlag.REC)
    os.chroot("/mnt/root")
    os.makedirs("/run/m/lib")
    os.symlink("/usr/lib/uml/modules", "/run/m/lib/modules")
    for name in {modules!r}:
        run("modprobe", "--set-version", os.uname().release, "--dirname", "/run/m", name)
"""
EPILOGUE = """
except SystemExit:
    print("uml: done", flush=True)
except BaseException:
    traceback.print_exc(file=sys.stdout)
    print("uml: failed", flush=True)
else:
    print("uml: done", flush=True)
init.Kernel().power_off()
"""


def run(folder: Path, program: str, disks: Sequence[Path] = (), seconds: float = 120) -> list[str]:
    """Run a program of Python as PID 1, with `disks` as /dev/ubda and on, and return what it printed.

    It has `init` and `k`, a Machine; `run` starts programs; files of the host are where they are.
    """
    script = folder / "uml-init"
    checkout = str(Path(__file__).resolve().parent.parent)
    body = "".join(f"    {line}\n" for line in program.strip().splitlines())
    script.write_text(PROLOGUE.format(checkout=checkout, modules=MODULES) + body + EPILOGUE)
    script.chmod(0o755)
    words = ["linux.uml", "mem=512M", "quiet", "rootfstype=hostfs", "rootflags=/", "rw", f"init={script}"]
    words += ["con=null", "con0=null,fd:1", *(f"ubd{number}={disk}" for number, disk in enumerate(disks))]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False, cwd=folder,
        env={"PATH": "/usr/sbin:/usr/bin", "TMPDIR": "/dev/shm", "HOME": str(folder)},
    )  # fmt: skip
    lines = done.stdout.decode(errors="replace").splitlines()
    assert "uml: done" in lines, "\n".join(lines[-60:]) + done.stderr.decode()
    return [line for line in lines[: lines.index("uml: done")] if line]


if __name__ == "__main__":
    print("\n".join(run(Path(sys.argv[1]), sys.stdin.read(), [Path(word) for word in sys.argv[2:]])))
