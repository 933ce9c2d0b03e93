"""The `schema` verb: a JSON schema (draft 2020-12) of the manifest that a person writes, for editors.

It says what the core's field tables say, as far as JSON schema can: that labels exist, that names are unique
and how a number is spelled is the core's alone, and the core decides. A test compares the two.
"""

from __future__ import annotations

import re

from mosinit import init

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, object]


def manifest() -> Schema:
    """Return the schema of an install manifest as a person writes it."""
    return {
        "$schema": DIALECT,
        "title": "mosinit install manifest",
        "description": "What `mosinit publish` takes: targets, and where their images come from.",
        **_object(
            {
                "version": _says("version of this format", const=1),
                "product": _text(init.UUID, "the keyset's product id, see `mosinit keys show`"),
                "sequence": _whole(1, init.MAX_SEQUENCE, "grows with each manifest of the product"),
                "epoch": _whole(1, init.MAX_EPOCH, "raised only when everything before is unsafe"),
                "update_type": _says("all targets of a machine, or some", enum=["complete", "partial"]),
                "storage": _list(_volume(), 256, "storage volumes"),
                "targets": _list(_target(), 256, "images with their roles"),
            },
            optional={"storage"},
        ),
    }


def _target() -> Schema:
    name = "hostfs and bootkit are named like their type"
    fields = {
        "service_name": _text(init.NAME, f"name of the target; {name}"),
        "service_type": _says("role", enum=["hostfs", "container", "fs-only", "bootkit"]),
        "source": _says("an OCI layout or docker archive beside the manifest, or an image in a registry",
                        type="string", pattern=r"^(oci:|docker-archive:|docker://)[!-~]{1,500}$"),
        "version": _text(init.VERSION, "version, in quotes if it looks like a number"),
        "nsgroup": _text(init.NAME, "targets and volumes with the same group share an id range"),
        "writable": _says("what of the root has a fresh writable layer; hostfs only",
                          enum=["all", "etc", "none"]),
        "network": _network(),
        "storage": _list(_mount(), 64, "where the target sees storage volumes"),
    }  # fmt: skip
    rules = [_if_type([kind], {"service_name": {"const": kind}}) for kind in ("hostfs", "bootkit")]
    rules.append(_if_type(["container", "fs-only", "bootkit"], {"writable": False}))
    none: Schema = {"properties": {"type": {"const": "none"}}}
    rules.append(_if_type(["hostfs", "fs-only", "bootkit"], {"network": none}))
    return {**_object(fields, optional={"nsgroup", "writable", "network", "storage"}), "allOf": rules}


def _network() -> Schema:
    port = _object({"host": _whole(1, 65535, "TCP port of the host"),
                    "container": _whole(1, 65535, "TCP port of the container")})  # fmt: skip
    fields = {
        "type": _says("how a container reaches the network", enum=["host", "none", "simple"]),
        "ipv4": _text(init.IPV4, "address with prefix length"),
        "ipv6": _text(init.IPV6, "address with prefix length"),
        "ports": _list(port, 1024, "ports of the host that lead to the container"),
    }
    alone: Schema = {"ipv4": False, "ipv6": False, "ports": {"maxItems": 0}}
    rule = {"if": {"properties": {"type": {"enum": ["host", "none"]}}}, "then": {"properties": alone}}
    return {**_object(fields, optional={"ipv4", "ipv6", "ports"}), "allOf": [rule]}


def _volume() -> Schema:
    fields = {
        "label": _text(init.NAME, "name of the volume"),
        "persistent": _says("does it survive a restart", type="boolean"),
        "nsgroup": _text(init.NAME, "targets of this group own it"),
        "size": _says("K, M, G or T, powers of 1024", type="string", pattern="^[1-9][0-9]{0,8}[KMGT]$"),
    }
    return _object(fields, optional={"nsgroup"})


def _mount() -> Schema:
    path = r"^(?!.*/\.{1,2}(/|$))(/[A-Za-z0-9._+@-]{1,255})+$"
    return _object({"dest": _says("where in the target", type="string", pattern=path),
                    "label": _text(init.NAME, "label of a storage volume")})  # fmt: skip


# --- The words of JSON schema -------------------------------------------------------------------------


def _says(description: str, **words: object) -> Schema:
    return {"description": description, **words}


def _object(fields: dict[str, Schema], optional: set[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": [name for name in fields if name not in (optional or set())],
        "additionalProperties": False,
    }


def _list(items: Schema, limit: int, description: str) -> Schema:
    return _says(description, type="array", maxItems=limit, items=items)


def _whole(low: int, high: int, description: str) -> Schema:
    # 042 is 34 or 42, whoever reads it: a schema sees the number alone.
    said = f"{description}; in digits, without a zero in front"
    return _says(said, type="integer", minimum=low, maximum=high)


def _text(pattern: re.Pattern[str], description: str) -> Schema:
    return _says(description, type="string", pattern=f"^{pattern.pattern}$")


def _if_type(kinds: list[str], then: Schema) -> Schema:
    return {
        "if": {"properties": {"service_type": {"enum": kinds}}, "required": ["service_type"]},
        "then": {"properties": then},
    }
