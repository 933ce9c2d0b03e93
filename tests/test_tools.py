"""The tools tree: where its packages come from, when another one is made, and what is never removed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mosinit import tools
from mosinit.host import Failure
from tests import recorder

MIRROR = "http://mirror.example/debian"
SECURITY = "http://mirror.example/debian-security"
SIGNED = f"deb [signed-by={tools.KEYRING}]"


class Recorder(recorder.Recorder):
    """A host on which one program fails, and nothing is unmounted."""

    def __init__(self, *, fails: str = "") -> None:
        super().__init__()
        self.fails = fails

    def call(self, command: recorder.Command, **options: Any) -> int:
        super().call(command, **options)
        return int(bool(self.fails) and self.fails in self.ran[-1])

    def unmount(self, target: str, *, lazy: bool = False) -> None:
        self.note(["unmount", target])


# --- Where packages come from ------------------------------------------------------------------------


def apt(folder: Path, **files: str) -> Path:
    """Make an apt folder; `list_x` becomes sources.list.d/x.list, `sources_x` x.sources, `main`
    sources.list.
    """
    (folder / "sources.list.d").mkdir(exist_ok=True)
    for name, text in files.items():
        kind, _, rest = name.partition("_")
        path = folder / "sources.list" if name == "main" else folder / "sources.list.d" / f"{rest}.{kind}"
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        "",
        "[arch=amd64] ",
        "[arch=amd64 signed-by=/usr/share/keyrings/x.gpg] ",
        "[ arch=amd64 signed-by=/x ] ",
        "[signed-by=/x check-valid-until=no trusted=yes]\t",
    ],
)
def test_one_line_sources(tmp_path: Path, options: str) -> None:
    text = f"deb {options}{MIRROR}/ bookworm main contrib # the archive\n"
    assert tools.debian_sources(apt(tmp_path, main=text), "trixie") == [f"{SIGNED} {MIRROR} trixie main"]


def test_pockets_follow_the_host(tmp_path: Path) -> None:
    text = f"""\
deb {MIRROR} bookworm main
deb-src {MIRROR} bookworm main
deb {MIRROR} bookworm-updates main
deb {SECURITY} bookworm-security main
deb {MIRROR} bookworm-backports main
"""
    assert tools.debian_sources(apt(tmp_path, list_x=text), "trixie") == [
        f"{SIGNED} {MIRROR} trixie main",
        f"{SIGNED} {MIRROR} trixie-updates main",
        f"{SIGNED} {SECURITY} trixie-security main",
    ]


def test_deb822_sources(tmp_path: Path) -> None:
    text = f"""\
# Debian
Types: deb deb-src
URIs: {MIRROR}/
Suites: bookworm bookworm-updates
Components: main non-free-firmware
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 Version: nothing: to see
 .
 mQINBFxyz
 -----END PGP PUBLIC KEY BLOCK-----

types: deb
uris:
# a comment inside
 {SECURITY}
suites: bookworm-security
components: main
"""
    assert tools.debian_sources(apt(tmp_path, sources_debian=text), "trixie") == [
        f"{SIGNED} {MIRROR} trixie main",
        f"{SIGNED} {MIRROR} trixie-updates main",
        f"{SIGNED} {SECURITY} trixie-security main",
    ]


@pytest.mark.parametrize("line", ["Enabled: no", "Enabled: false"])
def test_deb822_sources_that_are_switched_off(tmp_path: Path, line: str) -> None:
    text = f"Types: deb\n{line}\nURIs: {MIRROR}\nSuites: bookworm\nComponents: main\n"
    assert tools.debian_sources(apt(tmp_path, sources_x=text), "trixie") == []


@pytest.mark.parametrize(
    "line",
    [
        "deb http://archive.example/ubuntu noble main universe",
        "deb [arch=amd64] https://packages.example/microsoft/debian/12/prod bookworm main",
        "deb https://packages.example stable main",
        "deb http://apt.example/pub/repos/apt bookworm-pgdg main",
        "deb https://download.example/linux/debian bookworm stable",
        "deb cdrom:[Debian GNU/Linux 12.5.0 _Bookworm_ - Official amd64 DVD]/ bookworm main",
        f"# deb {MIRROR} bookworm main",
        f"deb {MIRROR} bookworm contrib # main",
        f"deb-src {MIRROR} bookworm main",
        f"deb {SECURITY} bookworm-security main",
        "deb",
        "",
    ],
)
def test_what_is_no_source_of_debian_leaves_the_default(tmp_path: Path, line: str) -> None:
    assert tools.debian_sources(apt(tmp_path, main=line + "\n"), "trixie") == []


@pytest.mark.parametrize(
    "uri",
    [
        "mirror+file:/etc/apt/mirrors/debian.list",
        "https://proxy.example/repository/debian-remote",
        "http://snapshot.example/archive/debian/20250520T000000Z",
    ],
)
def test_other_forms_of_mirrors(tmp_path: Path, uri: str) -> None:
    text = f"deb {uri} bookworm main\n"
    assert tools.debian_sources(apt(tmp_path, main=text), "trixie") == [f"{SIGNED} {uri} trixie main"]


def test_no_sources_at_all(tmp_path: Path) -> None:
    assert tools.debian_sources(tmp_path / "absent", "trixie") == []


# --- When another tree is made -----------------------------------------------------------------------


def test_the_key_follows_the_content() -> None:
    same = tools.key_of("trixie", ("a", "b"), ("w==1",))
    assert same == tools.key_of("trixie", ("a", "b"), ("w==1",))
    assert same != tools.key_of("trixie", ("a", "c"), ("w==1",))
    assert same != tools.key_of("trixie", ("a", "b"), ("w==2",))
    assert same != tools.key_of("forky", ("a", "b"), ("w==1",))
    assert tools.key() == tools.key_of(tools.SUITE, tools.PACKAGES, tools.WHEELS)


def stamped(folder: Path, name: str, *, age: float = 0) -> Path:
    """Make a tree, last used `age` seconds ago."""
    tree = folder / name
    (tree / tools.STAMP).parent.mkdir(parents=True)
    (tree / tools.STAMP).write_text("another key")
    (folder / f"{name}.lock").touch()
    os.utime(folder / f"{name}.lock", (time.time() - age,) * 2)
    return tree


def test_a_whole_tree_is_taken_as_it_is(tmp_path: Path) -> None:
    host = Recorder()
    tree = stamped(tmp_path, f"tools-{tools.key()}", age=1e9)
    assert tools.ensure(host, tmp_path) == tree
    assert host.ran == []


def test_old_trees_go_when_unused(tmp_path: Path) -> None:
    stamped(tmp_path, f"tools-{tools.key()}")
    recent = stamped(tmp_path, "tools-1111", age=tools.UNUSED_SECONDS - 60)
    old = stamped(tmp_path, "tools-2222", age=tools.UNUSED_SECONDS + 60)
    half = stamped(tmp_path, "tools-3333.new")
    (tmp_path / "packages").mkdir()
    tools.ensure(Recorder(), tmp_path)
    assert recent.is_dir()
    assert not old.exists()
    assert not half.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["packages", "tools.lock", "tools-1111", "tools-1111.lock"]
        + [f"tools-{tools.key()}", f"tools-{tools.key()}.lock"]
    )


def test_a_tree_in_use_stays_however_old(tmp_path: Path) -> None:
    stamped(tmp_path, f"tools-{tools.key()}")
    old = stamped(tmp_path, "tools-2222", age=tools.UNUSED_SECONDS + 60)
    with open(f"{old}.lock") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        tools.ensure(Recorder(), tmp_path)
        assert old.is_dir()
    tools.ensure(Recorder(), tmp_path)
    assert not old.exists()


def test_the_lock_of_a_user_outlives_exec(tmp_path: Path) -> None:
    old = stamped(tmp_path, "tools-2222", age=tools.UNUSED_SECONDS + 60)
    program = (
        "import os, sys; from pathlib import Path; from mosinit import tools;"
        f"tools._use(Path({str(old)!r})); os.execv('/bin/sh', ['sh', '-c', 'echo used; read answer'])"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == b"used\n"
        os.utime(f"{old}.lock", (0, 0))
        stamped(tmp_path, f"tools-{tools.key()}")
        tools.ensure(Recorder(), tmp_path)
        assert old.is_dir()
        child.communicate(b"\n", timeout=10)


def test_a_failed_tree_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    host = Recorder(fails="mmdebstrap")
    with pytest.raises(Failure, match="mmdebstrap failed with status 1"):
        tools.ensure(host, tmp_path)
    assert not (tmp_path / f"tools-{tools.key()}").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="XDG_CACHE_HOME"):
        tools.ensure(Recorder(), tmp_path / "file")


def test_mounts_below_a_folder_are_found_by_whole_names() -> None:
    text = """\
1 0 8:1 / / rw - ext4 /dev/root rw
2 1 0:5 / /cache/tools-1.new/dev rw - tmpfs none rw
3 2 0:6 / /cache/tools-1.new/dev/with\\040space rw - tmpfs none rw
4 1 0:7 / /cache/tools-1.newer rw - tmpfs none rw
"""
    assert tools.mounts_below(text, Path("/cache/tools-1.new")) == [
        "/cache/tools-1.new/dev",
        "/cache/tools-1.new/dev/with space",
    ]


# --- What is visible inside --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/keys", "/usr/src/x", "/var/lib/x", "/var/tmp/../lib", "/boot"])
def test_hidden_paths(path: str) -> None:
    assert tools.hidden(Path(path))


@pytest.mark.parametrize("path", ["/", "/root/x", "/home/x", "/srv", "/tmp/etc", "/var/tmp/x", "/run/x"])
def test_visible_paths(path: str) -> None:
    assert not tools.hidden(Path(path))


def test_hidden_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    assert tools.hidden(tmp_path / "link" / "keys")


# --- Whose folder the cache is ------------------------------------------------------------------------


def a_tree(folder: Path) -> Path:
    """Make what looks like a whole tools tree."""
    tree = folder / f"tools-{tools.key()}"
    (tree / tools.STAMP).parent.mkdir(parents=True)
    (tree / tools.STAMP).write_text(tools.key())
    return tree


@pytest.mark.parametrize("what", ["cache", "above", "tree"])
@pytest.mark.parametrize("how", ["owner", "mode", "group"])
def test_what_others_may_change_never_runs(what: str, how: str, tmp_path: Path) -> None:
    """Its programs would run as root."""
    cache = tmp_path / "above/cache"
    cache.mkdir(parents=True)
    tree = a_tree(cache)
    assert tools.ensure(Recorder(), cache) == tree
    place = {"cache": cache, "above": cache.parent, "tree": tree}[what]
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives folders away")
        os.chown(place, 65534, 65534)
    else:
        place.chmod(0o777 if how == "mode" else 0o775)
    with pytest.raises(Failure, match="others may change, .*: name a folder of your own with XDG_CACHE"):
        tools.ensure(Recorder(), cache)


def test_a_cache_in_a_folder_for_all_that_keeps_owners(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "tmp/cache").mkdir()
    tree = a_tree(tmp_path / "tmp/cache")
    assert tools.ensure(Recorder(), tmp_path / "tmp/cache") == tree


@pytest.mark.parametrize("name", ["tools.lock", "mkosi.lock"])
def test_a_lock_that_is_a_link_leads_nowhere(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("somebody's file")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(Failure, match="cannot lock"), tools.locked(tmp_path / name):
        pass
    assert victim.read_text() == "somebody's file"


def test_a_lock_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "tools.lock").write_text("text")
    with tools.locked(tmp_path / "tools.lock"):
        pass
    assert (tmp_path / "tools.lock").read_text() == "text"


def test_where_mosinit_started_the_system(tmp_path: Path) -> None:
    """There a verb of machines makes no tools tree: hostfs has what it calls."""
    assert not tools.on_machine(tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    assert tools.on_machine(tmp_path)
