"""ioctl numbers, structures and constants against the C headers (btrfs and fanotify: with the tests of their modules)."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

from partitions import require, run

from snapshotter.linux import fallocate, fiemap, fsuuid, handles, inode_flags, libc, statx

ROOT = Path(__file__).parent.parent
HEADERS = ("fcntl.h", "linux/fs.h", "linux/falloc.h", "linux/fiemap.h", "linux/stat.h", "linux/btrfs.h")
SIZES = {
    "struct fiemap": fiemap._FIEMAP.size,
    "struct fiemap_extent": fiemap._EXTENT.size,
    "struct fsxattr": fiemap._FSXATTR.size,
    "struct btrfs_ioctl_fs_info_args": fsuuid._BTRFS_FS_INFO_SIZE,
    "struct statx": statx.STATX_SIZE,
    "struct file_handle": handles._HEAD.size,
}
OFFSETS = {
    ("struct fiemap", "fm_mapped_extents"): 20,  # unpack_from(...)[3]
    ("struct fiemap_extent", "fe_flags"): 40,
    ("struct fsxattr", "fsx_nextents"): 8,  # unpack_from(...)[2]
    ("struct btrfs_ioctl_fs_info_args", "fsid"): 16,
    ("struct statx", "stx_attributes"): 8,
    ("struct statx", "stx_mode"): 28,
    ("struct statx", "stx_ino"): 32,
    ("struct statx", "stx_btime"): 80,
    ("struct statx", "stx_mtime"): 112,
    ("struct statx", "stx_rdev_major"): 128,
    ("struct statx", "stx_dev_minor"): 140,
}


def compiled(directory, headers, expressions):
    """What a C compiler makes of each expression; one that names a macro the headers lack is left out."""
    require(shutil.which("gcc") is not None, "gcc")
    lines = [f"#include <{header}>" for header in (*headers, "stdio.h", "stddef.h")]
    lines.append("int main(void) {")
    for number, expression in enumerate(expressions):
        line = f'printf("{number} %llu\\n", (unsigned long long)({expression}));'
        lines += [f"#ifdef {expression}", line, "#endif"] if expression.isidentifier() else [line]
    (directory / "numbers.c").write_text("\n".join([*lines, "return 0; }", ""]))
    run("gcc", "-D_GNU_SOURCE", "-o", directory / "numbers", directory / "numbers.c")
    pairs = (line.split() for line in run(directory / "numbers").stdout.decode().splitlines())
    return {expressions[int(number)]: int(value) for number, value in pairs}


def constants(*modules):
    """The public constants of modules whose names are the kernel's."""
    prefixes = ("FALLOC_", "FS_", "FIEMAP_", "FICLONE", "AT_", "STATX_", "MAX_HANDLE_SZ", "BTRFS_")
    return {
        name: value % 2**64
        for module in modules
        for name, value in vars(module).items()
        if name.startswith(prefixes) and isinstance(value, int)
    }


def test_constants_are_those_of_the_headers(tmp_path):
    ours = constants(fallocate, fiemap, fsuuid, inode_flags, handles, statx)
    del ours["STATX_SIZE"]  # no macro: the size of the structure, see below
    theirs = compiled(tmp_path, HEADERS, list(ours))
    lacking = {"FS_IOC_GETFSUUID"}  # since Linux 6.9; older headers do not have it
    assert set(ours) - set(theirs) <= lacking
    assert {name: ours[name] for name in theirs} == theirs


def test_structures_are_those_of_the_headers(tmp_path):
    ours = {f"sizeof({name})": size for name, size in SIZES.items()}
    ours |= {f"offsetof({name}, {member})": offset for (name, member), offset in OFFSETS.items()}
    assert compiled(tmp_path, HEADERS, list(ours)) == ours


def test_statx_is_read_where_the_members_are():
    """The format string's members, in their order, lie at the offsets checked above."""
    sizes = {"I": 4, "H": 2, "Q": 8, "q": 8, "x": 1}
    offsets, at, repeat = [], 0, ""
    for char in statx._STATX.format.removeprefix("="):
        if char.isdigit():
            repeat += char
        elif char in sizes:
            for _ in range(int(repeat or 1)):
                if char != "x":
                    offsets.append(at)
                at += sizes[char]
            repeat = ""
    members = {"stx_attributes": 2, "stx_mode": 6, "stx_ino": 7, "stx_btime": 13, "stx_mtime": 17, "stx_rdev_major": 19}
    members["stx_dev_minor"] = 22
    assert {m: offsets[index] for m, index in members.items()} == {m: OFFSETS["struct statx", m] for m in members}


def test_xfs_geometry_is_that_of_the_header(tmp_path):
    try:
        theirs = compiled(
            tmp_path,
            ("xfs/xfs.h", "xfs/xfs_fs.h"),
            ["XFS_IOC_FSGEOMETRY_V1", "sizeof(struct xfs_fsop_geom_v1)", "offsetof(struct xfs_fsop_geom_v1, uuid)"],
        )
    except AssertionError:
        require(condition=False, lacking="xfs/xfs_fs.h (xfslibs-dev)")
    ours = (fsuuid.XFS_IOC_FSGEOMETRY_V1, fsuuid._XFS_FSOP_GEOM_V1_SIZE, fsuuid._XFS_UUID_OFFSET)
    assert tuple(theirs.values()) == ours


def test_ext4_getfsuuid_is_that_of_the_kernel(tmp_path):
    """Its header is not installed everywhere (fs/ext4/ext4.h before 6.4), so its text is repeated here."""
    define = "_IOR('f', 44, struct fsuuid)"
    (tmp_path / "ext4_fsuuid.h").write_text(
        "struct fsuuid { unsigned fsu_len, fsu_flags; unsigned char fsu_uuid[]; };\n"
    )
    theirs = compiled(tmp_path, ("linux/ioctl.h", f"{tmp_path}/ext4_fsuuid.h"), [define])
    assert list(theirs.values()) == [fsuuid.EXT4_IOC_GETFSUUID]


def test_getfsuuid_is_that_of_the_kernel(tmp_path):
    """Repeated from include/uapi/linux/fs.h, for headers before Linux 6.9."""
    (tmp_path / "fsuuid2.h").write_text("struct fsuuid2_ { unsigned char len, uuid[16]; };\n")
    theirs = compiled(tmp_path, ("linux/ioctl.h", f"{tmp_path}/fsuuid2.h"), ["_IOR(0x15, 0, struct fsuuid2_)"])
    assert list(theirs.values()) == [fsuuid.FS_IOC_GETFSUUID]


def test_what_is_free_in_the_heap_goes_back_to_the_kernel():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    libc.libc.malloc.restype = ctypes.c_void_p
    pieces = [libc.libc.malloc(100_000) for _ in range(640)]  # below the size that gets a mapping of its own
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    full = resident()
    for piece in pieces[:-1]:  # the last one keeps the heap's end where it is
        libc.libc.free(ctypes.c_void_p(piece))
    libc.trim_heap()
    assert full - resident() > 32 << 20
    libc.libc.free(ctypes.c_void_p(pieces[-1]))


def test_threads_share_one_heap():
    """glibc would make them heaps of their own: malloc_info(3) counts them."""
    program = """
import ctypes, threading
from snapshotter.linux import libc
if {one}:
    libc.single_heap()
libc.libc.malloc.restype = ctypes.c_void_p
held = threading.Barrier(5)
def allocate():
    libc.libc.malloc(1000)
    held.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
held.wait()
libc.libc.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.libc.fdopen(1, b"w"))
libc.libc.malloc_info(0, file)
libc.libc.fflush(file)
"""

    def heaps(one):
        return run(sys.executable, "-c", program.replace("{one}", str(one)), cwd=ROOT).stdout.count(b"<heap nr=")

    assert heaps(False) > 1
    assert heaps(True) == 1
