"""The real hostfs with one more layer: probe.py, which runs as root once everything has started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from world import World, make_tar, put

from mosinit import approvals, hostfs, images, pe

SERVICE = b"""[Unit]
After=multi-user.target mosinit-boot-good.service
Before=mosinit-report.service

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -B /usr/lib/probe/probe.py
"""
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


def release(world: World) -> Path:
    """Publish a release with it."""
    layout = world.folder / "probed-hostfs"
    shutil.copytree(hostfs.build(world.host, world.folder / "debian"), layout)
    add_layer(layout, make_tar(files(world)))
    return world.release("probed", None)


def files(world: World) -> dict[str, bytes]:
    """Return the files of the layer. What approves the UKI is public: it lies on the ESP."""
    uki = world.bootable.ukis["run"].path.read_bytes()
    given = {
        "approval": pe.parse(uki).section(uki, approvals.APPROVAL).decode(),
        "pcr11": approvals.predict_pcr11(uki).hex(),
    }
    return {
        "usr/lib/probe/probe.py": Path(__file__).with_name("probe.py").read_bytes(),
        # With it a live system would answer by SSH.
        "etc/mosinit/installer_keys": b"ssh-ed25519 AAAA nobody\n",
        "usr/lib/probe/given.json": json.dumps(given).encode(),
        "usr/lib/systemd/system/probe.service": SERVICE,
        "usr/lib/systemd/system/multi-user.target.d/probe.conf": b"[Unit]\nWants=probe.service\n",
    }


def add_layer(folder: Path, tar: bytes) -> None:
    """Put one more layer on top of the image of an OCI layout."""
    layout = images.Layout(folder)

    def read(described: dict[str, str]) -> dict[str, object]:
        document = json.loads(layout.blob_path(described["digest"]).read_bytes())
        assert isinstance(document, dict)
        return document

    index = json.loads((folder / "index.json").read_bytes())
    manifest = read(index["manifests"][0])
    config = read(manifest["config"])  # type: ignore[arg-type]
    layer = put(folder, tar, LAYER_TYPE)
    manifest["layers"] = [*manifest["layers"], layer]  # type: ignore[misc]
    config["rootfs"]["diff_ids"].append(layer["digest"])  # type: ignore[index]
    config.pop("history", None)
    manifest["config"] = put(folder, json.dumps(config).encode(), images.CONFIG_TYPE)
    index["manifests"] = [put(folder, json.dumps(manifest).encode(), images.MANIFEST_TYPE)]
    (folder / "index.json").write_text(json.dumps(index))
