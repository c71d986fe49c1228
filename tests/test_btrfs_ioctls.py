"""The btrfs ioctls against the C headers, and what the view of a snapshot says against the live tree."""

import os
import shutil
import stat

import pytest
from btrfs_engine import BLOCK, KEEP_SIZE, Engine, fallocate, opened, write_at
from partitions import require, run

from comparer.model import Ident
from snapshotter.linux import btrfs as ioctls
from snapshotter.linux.handles import decode, name_to_handle_at

pytestmark = pytest.mark.kernel


@pytest.fixture
def made(btrfs):
    return Engine(btrfs.path)


# ---- the kernel's interface


def test_ioctl_numbers_and_layouts_are_the_kernels(tmp_path):
    require(shutil.which("gcc") is not None, "gcc")
    names = [n for n in vars(ioctls) if n.startswith("BTRFS_")]
    lines = "".join(f'printf("{n} %llu\\n", (unsigned long long){n});\n' for n in names)
    layouts = {
        "_VOL_ARGS": "btrfs_ioctl_vol_args",
        "_VOL_ARGS_V2": "btrfs_ioctl_vol_args_v2",
        "_SEARCH_ARGS_V2": "btrfs_ioctl_search_args_v2",
        "_SEARCH_HEADER": "btrfs_ioctl_search_header",
        "_FS_INFO_ARGS": "btrfs_ioctl_fs_info_args",
        "_DEV_INFO_ARGS": "btrfs_ioctl_dev_info_args",
        "_SEND_ARGS": "btrfs_ioctl_send_args",
        "_SUBVOL_INFO_ARGS": "btrfs_ioctl_get_subvol_info_args",
    }
    lines += "".join(f'printf("{n} %zu\\n", sizeof(struct {s}));\n' for n, s in layouts.items())
    lines += 'printf("_NR_ITEMS %zu\\n", offsetof(struct btrfs_ioctl_search_key, nr_items));\n'
    head = "#include <stdio.h>\n#include <stddef.h>\n#include <linux/btrfs.h>\n#include <linux/btrfs_tree.h>\nint main(void) {\n"
    (tmp_path / "numbers.c").write_text(head + lines + "return 0;\n}\n")
    run("gcc", "-o", tmp_path / "numbers", tmp_path / "numbers.c")
    output = run(tmp_path / "numbers").stdout.decode().split()
    theirs = dict(zip(output[::2], map(int, output[1::2]), strict=True))
    ours = {n: getattr(ioctls, n) for n in [*names, "_NR_ITEMS"]} | {n: getattr(ioctls, n).size for n in layouts}
    assert theirs == ours


def test_devices_and_sizes(btrfs):
    with opened(btrfs.path) as fd:
        info = ioctls.fs_info(fd)
        assert (info.num_devices, info.sectorsize) == (1, BLOCK)
        assert list(ioctls.dev_info(fd)) == [(1, btrfs.device.encode())]


def test_a_snapshot_is_on_the_disk_when_it_is_taken(btrfs, tmp_path):
    made = Engine(btrfs.path)
    (btrfs.path / "f").write_bytes(b"unsynced")
    made.capture()
    run("cp", "--sparse=always", btrfs.image, tmp_path / "copy.img")
    dump = run("btrfs", "inspect-internal", "dump-tree", "-t", "root", tmp_path / "copy.img").stdout
    assert b" name 1\n" in dump, "the snapshot's entry in the root tree"


# ---- identity


def test_identities_are_those_of_file_handles_on_the_live_tree(made, btrfs):
    top = btrfs.path
    (top / "d").mkdir()
    (top / "d/f").write_bytes(b"x")
    os.symlink("target", top / "s")
    os.mkfifo(top / "p")
    live = {}
    with opened(top) as fd:
        for name in (b"", b"d", b"d/f", b"s", b"p"):
            live[name] = decode(*name_to_handle_at(fd, name))
    view = made.capture().new
    assert view.root == live[b""]
    assert dict(view.children(view.root)) == {b"d": live[b"d"], b"s": live[b"s"], b"p": live[b"p"]}
    assert view.child(live[b"d"], b"f") == live[b"d/f"]
    assert list(view.names(live[b"d/f"])) == [(live[b"d"], b"f")]
    ino, gen = live[b"d/f"]
    other = Ident(ino, gen + 1)
    assert (view.attr(other), list(view.names(other)), view.child(Ident(live[b"d"].ino, 99), b"f")) == (None, [], None)
    (top / "later").mkdir()
    assert made.capture().new.root == live[b""]


def test_attributes_are_those_that_stat_shows(made, btrfs):
    """Oracle entries lack birth time and blocks, so those are compared here."""
    top = btrfs.path
    (top / "inline").write_bytes(b"x" * 100)
    (top / "large").write_bytes(b"x" * 300_000)
    (top / "holey").write_bytes(b"")
    os.truncate(top / "holey", 1 << 30)
    write_at(top / "holey", 1 << 20, b"y")
    fallocate(top / "holey", KEEP_SIZE, 1 << 31, 1 << 20)
    os.symlink("t" * 3000, top / "s")
    os.mknod(top / "dev", stat.S_IFCHR | 0o600, os.makedev(300, 70000))
    view = made.capture().new
    for name, ident in [*view.children(view.root), (b"", view.root)]:
        path = os.path.join(os.fsencode(top), name)
        attr, real = view.attr(ident), os.lstat(path)
        assert (attr.size, attr.blocks) == (real.st_size, real.st_blocks * 512), name
        born = run("stat", "-c", "%w", path).stdout.decode().split()
        if born[1:]:
            assert f"{attr.btime_ns % 10**9:09d}" == born[1].partition(".")[2]
        assert attr.rdev == (os.makedev(300, 70000) if name == b"dev" else None)
        assert attr.target == (b"t" * 3000 if name == b"s" else None)
