"""manifest.git, made by real git and read without it: generations, and what an attacker's git may hold."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosinit import init
from tests.fake import PRODUCT, UKI_ID, FakeMachine, policy_json
from tests.test_init_manifest import CA, CA_KEY, HEAD, HOSTFS, P256, certificate, sign

POLICY = init.parse_policy(policy_json(), UKI_ID.encode(), {"manifest-ca.pem": CA})
LEAF = certificate(P256, CA_KEY)
BOOTKIT = HOSTFS.replace("hostfs", "bootkit").replace("targets:\n", "")


def install_manifest(sequence: int, targets: str = HOSTFS + BOOTKIT, kind: str = "complete") -> bytes:
    head = HEAD.replace("sequence: 42", f"sequence: {sequence}").replace("complete", kind)
    return (head + targets).encode()


class Repository:
    """A manifest.git made by real git."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *words: str) -> str:
        environment = {
            **os.environ, "HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1", "EMAIL": "m@localhost",
            "GIT_AUTHOR_NAME": "m", "GIT_COMMITTER_NAME": "m",
        }  # fmt: skip
        command = ["git", "-c", "gc.auto=0", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, check=True, text=True
        ).stdout.strip()

    def add(
        self, sequence: int, *manifests: bytes, uki: str = UKI_ID, signature: bytes | None = None
    ) -> str:
        """Commit a generation whose targets come from these manifests, the last one's first."""
        names: dict[str, str] = {}
        for text in manifests:
            sha256 = hashlib.sha256(text).hexdigest()
            for ending, data in (("", text), (".signed", signature or sign(P256, text))):
                (self.folder / f"{sha256}.yaml{ending}").write_bytes(data)
            (self.folder / f"{sha256}.pem").write_bytes(LEAF)
            names |= {target.service_name: sha256 for target in init.parse_manifest(text).targets}
        rows = "".join(f"  - {{service_name: {name}, manifest: {sha}}}\n" for name, sha in names.items())
        text_ = f'version: 1\nproduct: {PRODUCT}\nsequence: {sequence}\nuki: "{uki}"\ntargets:\n{rows}'
        return self.commit("manifest.yaml", text_.encode())

    def commit(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "generation")
        return self.git("rev-parse", "HEAD")

    def machine(self) -> FakeMachine:
        """Return a machine that sees this repository as its own."""
        k = FakeMachine()
        for path in (self.folder / ".git").rglob("*"):
            if path.is_file():
                k.files[f"{init.MANIFEST_GIT}/{path.relative_to(self.folder / '.git')}"] = path.read_bytes()
        return k


@pytest.fixture
def repository(tmp_path: Path, need: Callable[..., None]) -> Repository:
    """An empty one."""
    need("git")
    return Repository(tmp_path)


def entry(k: FakeMachine, name: str, attributes: int = 6) -> FakeMachine:
    k.variables[f"LoaderEntrySelected-{init.LOADER_GUID}"] = (attributes, f"{name}\0".encode("utf-16-le"))
    return k


def refused(k: FakeMachine) -> str:
    with pytest.raises(init.Refused) as caught:
        init.pick_generation(k, POLICY)
    return caught.value.check


def test_the_newest_generation_of_our_uki_is_taken(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    second = repository.add(2, install_manifest(2))
    repository.add(3, install_manifest(3), uki="cd" * 32)
    k = repository.machine()
    manifest = init.pick_generation(k, POLICY)
    assert (manifest.contents.sequence, k.report.facts["generation"]) == (2, second)
    assert [target.service_name for target in manifest.contents.targets] == ["hostfs", "bootkit"]


@pytest.mark.parametrize(
    ("name", "sequence"),
    [("mosinit_1+3.efi", 1), ("mosinit_1+2-1.efi", 1), ("mosinit_1.efi", 1), ("mosinit_2+3.efi", 2),
     ("mosinit_3+3.efi", 2), ("mosinit_9.efi", 2), ("other_1.efi", 2), ("mosinit_1x.efi", 2), ("", 2)],
)  # fmt: skip
def test_the_menu_s_choice_counts_if_it_is_ours(repository: Repository, name: str, sequence: int) -> None:
    repository.add(1, install_manifest(1))
    repository.add(2, install_manifest(2))
    repository.add(3, install_manifest(3), uki="cd" * 32)
    k = entry(repository.machine(), name)
    assert init.pick_generation(k, POLICY).contents.sequence == sequence


def test_a_stored_choice_is_anybody_s(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    repository.add(2, install_manifest(2))
    k = entry(repository.machine(), "mosinit_1.efi", attributes=7)
    assert init.pick_generation(k, POLICY).contents.sequence == 2


def test_a_chosen_generation_that_does_not_verify_gives_way_to_a_good_one(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    repository.add(2, install_manifest(2), signature=b"x" * 70)
    k = entry(repository.machine(), "mosinit_2.efi")
    assert init.pick_generation(k, POLICY).contents.sequence == 1


def test_targets_come_from_the_manifests_that_define_them(repository: Repository) -> None:
    """A partial update: a newer manifest has a newer bootkit, hostfs stays as it was."""
    old, new = install_manifest(4), install_manifest(5, "targets:\n" + BOOTKIT, "partial")
    repository.add(5, old, new)
    manifest = init.pick_generation(repository.machine(), POLICY)
    assert manifest.sha256 == hashlib.sha256(new).hexdigest()
    assert {target.service_name for target in manifest.contents.targets} == {"hostfs", "bootkit"}


ONE_OF_ITS_OWN = install_manifest(5, HOSTFS + BOOTKIT + BOOTKIT.replace("bootkit", "zot", 1).replace(
    "service_type: bootkit", "service_type: fs-only"))  # fmt: skip
GENERATIONS: dict[str, tuple[int, list[bytes], dict[str, int]]] = {
    "a manifest newer than it says": (4, [install_manifest(5)], {}),
    "a number that nobody signed": (6, [install_manifest(5)], {}),
    "two whole releases": (5, [install_manifest(4), install_manifest(5)], {"hostfs": 0}),
    "an update older than the release": (5, [install_manifest(4, kind="partial"), install_manifest(5)],
                                         {"hostfs": 0}),
    "not the newest definition": (5, [install_manifest(4), install_manifest(5, kind="partial")],
                                  {"hostfs": 0}),
    "two manifests of one number": (5, [install_manifest(5), install_manifest(5, kind="partial")],
                                    {"hostfs": 0}),
    "a target left out": (5, [ONE_OF_ITS_OWN], {"zot": -1}),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATIONS)
def test_what_a_generation_says_is_nobody_s_word(repository: Repository, case: str) -> None:
    """Its manifests are signed; which of them counts, and its number, follow from them."""
    sequence, manifests, said = GENERATIONS[case]
    repository.add(sequence, *manifests, uki="cd" * 32)
    path = repository.folder / "manifest.yaml"
    document = yaml.safe_load(path.read_text()) | {"uki": UKI_ID}
    for row in list(document["targets"]):
        if (index := said.get(row["service_name"])) is not None:
            row["manifest"] = hashlib.sha256(manifests[index]).hexdigest()
            if index < 0:
                document["targets"].remove(row)
    repository.commit("manifest.yaml", json.dumps(document).encode())
    assert refused(repository.machine()) == "MANIFEST-SEQUENCE"


def test_a_damaged_generation_of_the_past_stops_nothing(repository: Repository) -> None:
    first = repository.add(1, install_manifest(1))
    repository.add(2, install_manifest(2))
    k = repository.machine()
    del k.files[f"{init.MANIFEST_GIT}/objects/{first[:2]}/{first[2:]}"]
    assert init.pick_generation(k, POLICY).contents.sequence == 2
    assert "GIT-OBJECT" in str([op for op in k.ops if op[0] == "log"])


def test_a_machine_without_a_generation_of_this_uki(repository: Repository) -> None:
    repository.add(1, install_manifest(1), uki="cd" * 32)
    assert refused(repository.machine()) == "GENERATION"


def test_what_is_not_committed_does_not_count(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    k = repository.machine()
    k.files[f"{init.CONFIG}/manifest.yaml"] = b"version: 1\n"
    repository.git("config", "core.fsmonitor", "/bin/false")
    (repository.folder / ".git/hooks/post-checkout").write_text("#!/bin/sh\nfalse\n")
    assert init.pick_generation(k, POLICY).contents.sequence == 1


def test_packs_are_refused_as_that(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    repository.git("repack", "-a", "-d", "--quiet")
    repository.git("prune-packed")
    assert refused(repository.machine()) == "GIT-PACKED"


def test_packed_refs_are_refused(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    repository.git("pack-refs", "--all")
    assert refused(repository.machine()) == "GIT-PACKED"


def test_a_foreign_file_in_a_commit_is_refused(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    repository.commit("hello.txt", b"hello")
    assert refused(repository.machine()) == "GIT-OBJECT"


def test_a_link_in_a_commit_is_refused(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    (repository.folder / f"{'ab' * 32}.pem").symlink_to("/etc/passwd")
    repository.commit("manifest.yaml", (repository.folder / "manifest.yaml").read_bytes())
    assert refused(repository.machine()) == "GIT-OBJECT"


def test_a_missing_part_is_refused(repository: Repository) -> None:
    repository.add(1, install_manifest(1), uki="cd" * 32)
    next(repository.folder.glob("*.pem")).unlink()
    text = (repository.folder / "manifest.yaml").read_bytes().replace(b"cd" * 32, UKI_ID.encode())
    repository.commit("manifest.yaml", text)
    assert refused(repository.machine()) == "MANIFEST-ABSENT"


NO_TARGETS = f'version: 1\nproduct: {PRODUCT}\nsequence: 1\nuki: "{UKI_ID}"\ntargets: []\n'.encode()
GENERATION_FAULTS = [
    ("MANIFEST-FORMAT", b"version: 2\n"),
    ("MANIFEST-FORMAT", b""),
    ("MANIFEST-FORMAT", b"version: 1\nversion: 1\n"),
    ("MANIFEST-PRODUCT", NO_TARGETS.replace(PRODUCT.encode(), PRODUCT[:-1].encode() + b"0")),
    ("MANIFEST-TARGET", NO_TARGETS),
]  # fmt: skip


@pytest.mark.parametrize(("check", "text"), GENERATION_FAULTS)
def test_generation_faults(repository: Repository, check: str, text: bytes) -> None:
    repository.commit("manifest.yaml", text)
    assert refused(repository.machine()) == check


def test_each_object_that_is_damaged_or_gone_is_refused(repository: Repository) -> None:
    repository.add(1, install_manifest(1))
    whole = repository.machine()
    objects = [path for path in whole.files if "/objects/" in path and "/info/" not in path]
    assert len(objects) == 6
    others = [
        None,
        b"",
        b"\x78\x9c",
        bytes(2 << 20),
        zlib.compress(b"blob 1\0x"),
        zlib.compress(bytes(8 << 20)),
    ]
    for path in objects:
        for data in (*others, whole.files[path][:-1], whole.files[path] + b"x"):
            k = repository.machine()
            if data is None:
                del k.files[path]
            else:
                k.files[path] = data
            assert refused(k) == "GIT-OBJECT"


@pytest.mark.parametrize(
    "ref", [b"", b"ref: refs/heads/other\n", b"../../../etc/passwd", b"\xff" * 40, b"0" * 40]
)
def test_ref_faults(repository: Repository, ref: bytes) -> None:
    repository.add(1, install_manifest(1))
    k = repository.machine()
    k.files[f"{init.MANIFEST_GIT}/refs/heads/main"] = ref
    assert refused(k) in ("GIT-REF", "GIT-OBJECT")


def test_history_is_bounded(repository: Repository) -> None:
    for sequence in range(1, init.MAX_GENERATIONS + 3):
        text = f'version: 1\nproduct: {PRODUCT}\nsequence: {sequence}\nuki: "{UKI_ID}"\ntargets: []\n'
        repository.commit("manifest.yaml", text.encode())
    generations = list(init.read_generations(repository.machine(), PRODUCT))
    assert len(generations) == init.MAX_GENERATIONS
    assert generations[0].sequence == init.MAX_GENERATIONS + 2


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["commit", "tree", "blob"]))
def test_no_object_crashes_the_reader(body: bytes, kind: str) -> None:
    k = FakeMachine()
    data = f"{kind} {len(body)}".encode() + b"\0" + body
    name = hashlib.sha1(data).hexdigest()
    k.files[f"{init.MANIFEST_GIT}/objects/{name[:2]}/{name[2:]}"] = zlib.compress(data)
    k.files[f"{init.MANIFEST_GIT}/refs/heads/main"] = name.encode() + b"\n"
    refused(k)
    if kind == "tree":
        try:
            assert all(len(value) == 40 for value in init.read_git_tree(k, name).values())
        except init.Refused as error:
            assert error.check == "GIT-OBJECT"
