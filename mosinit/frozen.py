"""Freeze the bring-up: one archive with the bytecode of the core and of exactly the modules that it imports.

This file is not imported: `initrd` runs it as a script in a clean, isolated interpreter (`python3 -I -S`),
so that `sys.modules` after importing the core is the answer and nothing of the build host can come in. For
that reason it imports nothing itself before the answer is known. It writes the archive and prints a JSON
object: the archive's modules, the stand-ins among them, and the extension modules (name, file, place in the
initrd).
"""

import sys

# Modules that `cryptography` imports for interfaces that we never call: a third of its start-up time, and
# code that could be reached in the initrd. In the archive STAND_IN takes the place of each.
LEFT_OUT = {
    "email.utils": "splits mail addresses when a certificate is made; brings parts of urllib and socket",
    "cryptography.hazmat.primitives.serialization.ssh": "OpenSSH keys; brings dataclasses, inspect, bcrypt",
    "cryptography.hazmat.backends.openssl.backend": "asked only when ECDSA signs; brings all ciphers",
}

STAND_IN = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def left_out(*_args, **_kwargs):
        raise ImportError(f"{__name__}.{name} is left out of the initrd")
    return left_out
"""


def load(core: str, packages: str) -> dict[str, object]:
    """Import the core and all that it names; return every module that is loaded then, by name."""
    sys.path.append(packages)
    for name in LEFT_OUT:
        sys.modules[name] = stand_in = type(sys)(name)
        exec(STAND_IN, stand_in.__dict__)
    with open(core, "rb") as file:
        code = compile(file.read(), core, "exec")
    sys.modules["mosinit"] = mosinit = type(sys)("mosinit")
    exec(code, mosinit.__dict__)
    for name in mosinit.FROZEN_IMPORTS:
        __import__(name)
    return dict(sys.modules)


LOADED = load(*sys.argv[1:3]) if __name__ == "__main__" else {}

# ruff: noqa: E402
import ast
import json
import marshal
import zipfile
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
EXTENSIONS = f"/usr/lib/python{VERSION}/lib-dynload"
UNCHECKED_HASH = 0b01  # PEP 552: the archive is the truth, no source is looked for


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Take docstrings out; assertions stay."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())) as docstring]:
                    node.body[:] = [ast.copy_location(ast.Pass(), docstring)]
                case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                    node.body[:] = rest
    return tree


def with_extensions(tree: ast.Module, folder: str) -> ast.Module:
    """Let a package find its extension modules: the dynamic loader cannot take them out of an archive."""
    futures = [x for x in tree.body if isinstance(x, ast.ImportFrom) and x.module == "__future__"]
    rest = [x for x in tree.body if x not in futures]
    tree.body = [*futures, *ast.parse(f"__path__.append({folder!r})").body, *rest]
    return tree


def bytecode(source: bytes, place: str, extensions: str | None) -> bytes:
    """Compile to a pyc whose code names its place in the archive, not a path of the build machine."""
    tree = without_docstrings(ast.parse(source))
    if extensions is not None:
        tree = with_extensions(tree, extensions)
    code = compile(tree, f"<{place}>", "exec", dont_inherit=True)
    return MAGIC_NUMBER + UNCHECKED_HASH.to_bytes(4, "little") + source_hash(source) + marshal.dumps(code)


def find(name: str) -> ModuleSpec | None:
    """Return where a loaded module came from; None for aliases and for what extension modules make."""
    spec = getattr(LOADED[name], "__spec__", None)
    if spec is None:
        # `cryptography` puts an object in the place of some modules, to warn of old names.
        parent = LOADED.get(name.rpartition(".")[0])
        spec = PathFinder.find_spec(name, getattr(parent, "__path__", []))
    return spec if isinstance(spec, ModuleSpec) and spec.name == name else None


def sort_out(core: str) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    """Return the modules for the archive (name: place, source) and the extension modules (name: file)."""
    sources: dict[str, tuple[str, bytes]] = {"mosinit": ("mosinit.py", Path(core).read_bytes())}
    extensions: dict[str, str] = {}
    for name in LOADED:
        spec = find(name)
        if name in LEFT_OUT:
            sources[name] = (f"{name.replace('.', '/')}.py", STAND_IN.encode())
        elif spec is not None and isinstance(spec.loader, SourceFileLoader):
            ending = ".py" if spec.submodule_search_locations is None else "/__init__.py"
            sources[name] = (name.replace(".", "/") + ending, Path(str(spec.origin)).read_bytes())
        elif spec is not None and isinstance(spec.loader, ExtensionFileLoader):
            extensions[name] = str(spec.origin)
    for name in list(sources):
        for parent in (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)):
            sources.setdefault(parent, (f"{parent.replace('.', '/')}/__init__.py", b""))
    return sources, extensions


def place_of(name: str, file: str) -> str:
    """Return where an extension module lies in the initrd."""
    return str(Path(EXTENSIONS, *name.split(".")[:-1], Path(file).name))


def write_archive(path: str, sources: dict[str, tuple[str, bytes]], extensions: dict[str, str]) -> None:
    """Write the archive, stored: zstd compresses the whole initrd better than deflate its parts."""
    owners = {name.rpartition(".")[0] for name in extensions} - {""}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, (place, source) in sorted(sources.items()):
            folder = f"{EXTENSIONS}/{name.replace('.', '/')}" if name in owners else None
            entry = zipfile.ZipInfo(place + "c", (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, bytecode(source, place, folder))


def main(core: str, target: str) -> None:
    """Write the archive to `target` and the list of what is in it to standard output."""
    sources, extensions = sort_out(core)
    write_archive(target, sources, extensions)
    listing = {
        "version": VERSION,
        "modules": sorted(sources),
        "left_out": sorted(LEFT_OUT),
        "extensions": [
            {"name": name, "file": file, "place": place_of(name, file)}
            for name, file in sorted(extensions.items())
        ],
    }
    json.dump(listing, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3])
