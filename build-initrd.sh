#!/bin/bash
# Packs the initrd: the frozen bring-up, the kernel modules that its policy lists, what is public of a keyset.
# Two builds of the same input are byte-identical. What goes in is decided in mosinit/initrd.py.
set -euo pipefail
export LC_ALL=C

usage() {
    cat <<'END'
usage: build-initrd.sh --kernel-modules DIR --policy FILE --organisation DIR --out FILE

  --kernel-modules DIR   lib/modules/VERSION of the kernel
  --policy FILE          policy of a mode: `mosinit build --out OUT` leaves OUT/live.policy.json, OUT/run.policy.json
  --organisation DIR     a keyset, or its public parts: certificates, keyset.json, pcr.pub, platform.pub
  --out FILE             the initrd; beside it FILE.parts.json (bytes of each part), FILE.contents (what is in it)
                         and FILE.key (what it was made from: the same again takes no time)
  --level N              zstd level, 19 unless told

example, in the tools tree: build-initrd.sh --kernel-modules out/kernel/6.12.0 --policy out/live.policy.json \
           --organisation keys --out initrd.cpio.zst
END
}

fail() {
    echo "build-initrd.sh: $1" >&2
    exit "${2:-1}"
}

modules='' policy='' organisation='' out='' level=19
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --kernel-modules | --policy | --organisation | --out | --level)
            [ $# -ge 2 ] || fail "$1 wants a value" 2
            name=${1#--}
            [ "$name" = kernel-modules ] && name=modules
            printf -v "${name//-/_}" '%s' "$2"
            shift 2
            ;;
        *) fail "unknown option $1: see --help" 2 ;;
    esac
done
for name in modules policy organisation out; do
    [ -n "${!name}" ] || fail "an option is missing: see --help" 2
done
for tool in cpio python3 zstd; do
    command -v "$tool" >/dev/null || fail "$tool is missing: run this inside the tools tree, as \`mosinit build\` does"
done

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() {
    PYTHONPATH=$here PYTHONDONTWRITEBYTECODE=1 python3 -m mosinit.initrd "$@"
}

step stage --kernel-modules "$modules" --policy "$policy" --organisation "$organisation" --root "$work/root" \
    >"$work/contents"

# Two archives in one stream: device nodes first, since making them as files takes root.
step nodes >"$work/initrd.cpio"
(cd "$work/root" && find . -mindepth 1 -printf '%P\0' | sort -z |
    cpio --quiet --null --create --format=newc --reproducible --owner=0:0) >>"$work/initrd.cpio"

key="$level $(sha256sum <"$work/initrd.cpio")"
if [ "$(cat "$out.key" 2>/dev/null)" = "$key $(sha256sum 2>/dev/null <"$out")" ]; then
    step table "$out.parts.json"
    exit
fi

# One thread: with more, the bytes could depend on how many the machine has.
zstd --quiet "-$level" --single-thread --no-progress "$work/initrd.cpio" -o "$work/initrd.cpio.zst"
step weigh --root "$work/root" --packed "$work/initrd.cpio.zst" >"$work/parts.json"
echo "$key $(sha256sum <"$work/initrd.cpio.zst")" >"$work/key"

# The key comes last: where it fits the initrd, the lists do too.
for pair in "contents .contents" "parts.json .parts.json" "initrd.cpio.zst " "key .key"; do
    target=$out${pair#* }
    cp "$work/${pair% *}" "$target.new"
    sync "$target.new"
    mv "$target.new" "$target"
done
step table "$out.parts.json"
