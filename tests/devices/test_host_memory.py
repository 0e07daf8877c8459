"""Free memory, read from trees of files that imitate machines, containers and batch jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jacdiag.devices.host_memory import free_host_memory
from jacdiag.monitor import probe_memory as memory
from jacdiag.pipeline import with_remedies as remedied

GB = 1024**3
NO_LIMIT_V1 = 9223372036854771712
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def machine(root: Path, available: int = 64 * GB) -> Path:
    return write(
        root, {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available // 1024} kB"}
    )


def v2_group(
    path: str, limit: object, used: int = 0, cache: int = 0, high: object = "max"
) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 7",
    }


def v1_group(path: str, limit: int, used: int = 0, cache: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 5\ntotal_inactive_file {cache}",
    }


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert free_host_memory(machine(tmp_path)) == 64 * GB


def test_neither_proc_nor_groups(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) is None


def test_v2_limit_of_the_own_group(tmp_path: Path) -> None:
    write(
        machine(tmp_path),
        {"proc/self/cgroup": "0::/job", "proc/self/mountinfo": V2_MOUNT.format(root="/")},
    )
    write(tmp_path, v2_group("job", 8 * GB, used=3 * GB, cache=1 * GB))
    assert free_host_memory(tmp_path) == 6 * GB


def test_v2_container_with_its_own_namespace(tmp_path: Path) -> None:
    write(
        machine(tmp_path),
        {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2_MOUNT.format(root="/")},
    )
    write(tmp_path, v2_group("", 2 * GB, used=GB))
    assert free_host_memory(tmp_path) == GB


@pytest.mark.parametrize(
    ("outer", "inner", "free"),
    [
        (4 * GB, 16 * GB, 3 * GB),
        (16 * GB, 4 * GB, 3 * GB),
        ("max", 4 * GB, 3 * GB),
        (4 * GB, "max", 3 * GB),
    ],
)
def test_v2_tightest_of_nested_groups(
    tmp_path: Path, outer: object, inner: object, free: int
) -> None:
    write(machine(tmp_path), {"proc/self/cgroup": "0::/slice/middle/job"})
    write(tmp_path, v2_group("slice", outer, used=GB))
    write(tmp_path, v2_group("slice/middle", "max", used=GB))
    write(tmp_path, v2_group("slice/middle/job", inner, used=GB))
    assert free_host_memory(tmp_path) == free


def test_v2_the_group_around_is_full_because_of_others(tmp_path: Path) -> None:
    write(machine(tmp_path), {"proc/self/cgroup": "0::/slice/job"})
    write(tmp_path, v2_group("slice", 10 * GB, used=10 * GB))
    write(tmp_path, v2_group("slice/job", 8 * GB, used=GB))
    assert free_host_memory(tmp_path) == 0


def test_v2_soft_limit_counts_as_the_limit(tmp_path: Path) -> None:
    write(machine(tmp_path), {"proc/self/cgroup": "0::/job"})
    write(tmp_path, v2_group("job", "max", used=GB, high=3 * GB))
    assert free_host_memory(tmp_path) == 2 * GB


def test_v2_no_limit_leaves_the_machine(tmp_path: Path) -> None:
    write(machine(tmp_path), {"proc/self/cgroup": "0::/job"})
    write(tmp_path, v2_group("job", "max", used=GB))
    assert free_host_memory(tmp_path) == 64 * GB


def test_v1_limit_of_the_memory_controller(tmp_path: Path) -> None:
    groups = "5:cpu:/elsewhere\n4:memory,hugetlb:/batch/job\n0::/"
    write(
        machine(tmp_path),
        {"proc/self/cgroup": groups, "proc/self/mountinfo": V1_MOUNT.format(root="/")},
    )
    write(tmp_path, v1_group("batch/job", 8 * GB, used=5 * GB, cache=2 * GB))
    write(tmp_path, v1_group("elsewhere", GB))
    assert free_host_memory(tmp_path) == 5 * GB


def test_v1_tightest_of_nested_groups(tmp_path: Path) -> None:
    write(machine(tmp_path), {"proc/self/cgroup": "4:memory:/batch/job"})
    write(tmp_path, v1_group("", NO_LIMIT_V1, used=GB))
    write(tmp_path, v1_group("batch", 3 * GB, used=GB))
    write(tmp_path, v1_group("batch/job", NO_LIMIT_V1, used=GB))
    assert free_host_memory(tmp_path) == 2 * GB


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/inner", "/", "/../other"])
def test_v1_container_that_sees_its_group_as_the_root(tmp_path: Path, path: str) -> None:
    mounts = V1_MOUNT.format(root="/docker/abc")
    write(
        machine(tmp_path), {"proc/self/cgroup": f"4:memory:{path}", "proc/self/mountinfo": mounts}
    )
    write(tmp_path, v1_group("", 4 * GB, used=GB))
    assert free_host_memory(tmp_path) == 3 * GB


def test_the_mount_point_is_read_from_the_list_of_mounts(tmp_path: Path) -> None:
    mounts = "garbled\n35 31 0:32 / /cgroups/mem rw - cgroup cgroup rw,memory"
    write(machine(tmp_path), {"proc/self/cgroup": "4:memory:/job", "proc/self/mountinfo": mounts})
    write(
        tmp_path,
        {"cgroups/mem/job/memory.limit_in_bytes": GB, "cgroups/mem/job/memory.usage_in_bytes": 0},
    )
    assert free_host_memory(tmp_path) == GB


def test_a_limit_above_what_the_machine_has_is_no_promise(tmp_path: Path) -> None:
    write(machine(tmp_path, available=GB), {"proc/self/cgroup": "0::/job"})
    write(tmp_path, v2_group("job", 500 * GB))
    assert free_host_memory(tmp_path) == GB


@pytest.mark.parametrize("content", ["", "nonsense", "0::", "::::", "4:memory:", "\x00"])
def test_garbled_files_are_passed_over(tmp_path: Path, content: str) -> None:
    write(machine(tmp_path), {"proc/self/cgroup": content, "proc/self/mountinfo": content})
    assert free_host_memory(tmp_path) == 64 * GB


def test_free_memory_of_this_machine_is_plausible() -> None:
    free = free_host_memory()
    assert free is not None
    assert 10**6 < free < 10**15


def test_every_reader_asks_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remedied.free_host_memory is free_host_memory
    monkeypatch.setattr(memory, "free_host_memory", lambda: 12345)
    assert memory.available(torch.device("cpu")) == 12345


def test_no_other_file_reads_it() -> None:
    package = Path(remedied.__file__).parent.parent
    signs = ("psutil", "MemAvailable", "meminfo", "/cgroup")
    readers = {
        path.name
        for path in package.rglob("*.py")
        if any(sign in path.read_text(encoding="utf-8") for sign in signs)
    }
    assert readers == {"host_memory.py"}
