# What recipes share; read by `build`, which provides $images.

say() { echo "images: $*" >&2; }

# A hash of the contents and names of files and folders.
key_of() {
    find "$@" -type f -print0 | sort -z | while IFS= read -r -d '' file; do
        echo "${file#"$here"} $(sha256sum <"$file")"
    done | sha256sum | cut -d' ' -f1
}

# Makes the folder kernel-$1 (cloud or full) here: `vmlinuz`, `version`, and `modules`, from
# Debian's own package, unpacked and not installed.
kernel() {
    local meta=linux-image-amd64 cached=$images/.packages package deb
    [ "$1" = full ] || meta=linux-image-cloud-amd64
    package=$(apt-cache depends "$meta" | awk '/Depends:/ { print $2; exit }')
    [ -n "$package" ] || { say "apt knows no $meta; run packaging/setup, or apt-get update"; return 1; }
    mkdir -p "$cached"
    deb=$(compgen -G "$cached/${package}_*.deb" | head -1 || true)
    if [ -z "$deb" ]; then
        (cd "$cached" && apt-get -q download "$package" >/dev/null 2>&1) ||
            { say "$package cannot be downloaded; run apt-get update as root"; return 1; }
        deb=$(compgen -G "$cached/${package}_*.deb" | head -1)
    fi
    dpkg-deb -x "$deb" "kernel-$1.all"
    mkdir "kernel-$1"
    echo "${package#linux-image-}" >"kernel-$1/version"
    mv "kernel-$1.all/boot/vmlinuz-${package#linux-image-}" "kernel-$1/vmlinuz"
    mv "kernel-$1.all/lib/modules/${package#linux-image-}" "kernel-$1/modules"
    rm -rf "kernel-$1.all"
    # depmod wants the layout of a root.
    mkdir -p "kernel-$1/root/lib/modules"
    ln -s ../../../modules "kernel-$1/root/lib/modules/${package#linux-image-}"
    /sbin/depmod -b "kernel-$1/root" "${package#linux-image-}"
}

# Prints the files of modules $2... of kernel-$1 and of what they depend on, in loading order,
# relative to the modules' folder. Modules that are built in are left out.
module_files() {
    local from=$1; shift
    local module
    for module in "$@"; do
        /sbin/modprobe -d "$from/root" -S "$(cat "$from/version")" --show-depends "$module" ||
            { say "there is no module $module"; return 1; }
    done | awk '$1 == "insmod" && !seen[$2]++ { sub(".*/lib/modules/[^/]*/", "", $2); print $2 }'
}

# Unpacks a bzImage's ELF kernel: $1 to $2. An emulated processor takes seconds for it.
unpack_kernel() {
    local sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$1")
    offset=$(od -An -tu4 -j $((0x248)) -N4 "$1")
    length=$(od -An -tu4 -j $((0x24c)) -N4 "$1")
    dd if="$1" of=payload bs=64K iflag=skip_bytes,count_bytes status=none \
        skip=$(((sectors + 1) * 512 + offset)) count=$((length))
    case $(od -An -tx1 -N4 payload | tr -d ' ') in
        fd377a58) xz -dc --single-stream payload >"$2" ;;
        28b52ffd) zstd -qdc payload >"$2" ;;
        1f8b*) gzip -dc payload >"$2" ;;
        *) say "the kernel $1 is compressed in a way that is not known here"; return 1 ;;
    esac || [ -s "$2" ] # xz reports the length that follows the stream
    rm payload
}

# Packs the folder $1 as an initramfs $2, uncompressed: under emulation that boots fastest.
pack_initramfs() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z |
        cpio --quiet --null --create --format=newc --owner=0:0 --reproducible) >"$2"
}

# This machine's own sources of Debian 12, as an apt source list.
sources() {
    apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' \
        'Created-By: Packages' 'Origin: Debian' 'Component: main' |
        awk '$3 ~ /^bookworm(-security|-updates)?$/ && !seen[$0]++' >sources.list
    if ! grep -q ' bookworm main' sources.list; then
        cat >sources.list <<'LIST'
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian-security bookworm-security main
LIST
    fi
    cat sources.list
}

# Makes a Debian 12 root as root.tar: $1 = packages (comma separated); more arguments go to mmdebstrap.
debian_root() {
    local packages=$1 option; shift
    local options=()
    while IFS= read -r option; do
        [ -z "$option" ] || options+=(--aptopt="$option")
    done < <(apt-config dump --format '%f "%v"%n' Acquire::http::Proxy Acquire::https::Proxy \
        Acquire::Check-Valid-Until Acquire::Check-Date | grep -v '""')
    sources | mmdebstrap --quiet --variant=minbase --architectures=amd64 \
        --include="$packages" \
        "${options[@]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/lintian/*' \
        "$@" \
        bookworm root.tar -
}

# Runs a script as root, or as one in its own user namespace: files then belong to whom they should.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then bash -euc "$1"; else mmdebstrap --unshare-helper bash -euc "$1"; fi
}

# Makes a raw ext4 image of root.tar: $1 = file, $2 = size. Its /dev stays empty: the kernel fills it, and only
# root could.
root_disk() {
    truncate -s "$2" "$1"
    chmod 0666 "$1"
    PATH=$PATH:/sbin:/usr/sbin as_root "
        mkdir root && tar -xf root.tar -C root --numeric-owner --exclude='./dev/*'
        mkfs.ext4 -q -F -L omega-root -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 -d root '$1'
        rm -rf root"
    rm root.tar
}

# A hook that puts the tree $1 into the root, owned by root whoever checked it out.
add_files() {
    echo "tar -C '$work/$1' --owner=0 --group=0 -c . | tar -C \"\$1\" -x --no-overwrite-dir"
}
