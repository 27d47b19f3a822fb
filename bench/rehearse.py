"""Would bench/gpu_visit.py work on the GPU machine? All that a CPU can tell of it.

    python bench/gpu_visit.py --rehearse FOLDER

FOLDER, which git ignores, is brought along beside the repository's files. It has wheels/, of
packages that the machine lacks, and data/, for --data. The rehearsal

1. adds up the size of what would travel;
2. looks for each package that the scripts import, in bench/gpu_machine.txt or among the wheels;
3. copies all that would travel into an empty folder and runs every stage there at tiny size, with
   an empty environment, without network where `unshare` can do that, and with a hook that refuses
   each package which the machine lacks and FOLDER does not bring;
4. looks at the number, sizes and names of the results.

It prints `ready`, or a line of each problem; exit status 0 or 1. bench/gpu_machine.txt has a line
of each package of the machine, with its version where that is known, and of its Python.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ROOT / "bench" / "gpu_machine.txt"
PROCESSOR = "x86_64"
MOST_TRAVELS = 64 * 2**20  # bytes
MOST_FILES, MOST_BYTES = 4, 16 * 2**20  # of results
SECONDS = 600  # for all stages at tiny size
PLATFORM = re.compile(rf"any|(manylinux\w+|linux)_{PROCESSOR}")
# Put before all else that an import asks; Python runs it as it starts.
HOOK = """import importlib.abc
import sys


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"{{name}}: the GPU machine has no such package", name=name)


sys.meta_path.insert(0, Refuse())
"""
# Without network but for the loopback, by which a process group meets.
ALONE = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


class RehearsalError(Exception):
    """Bad input: one line for the user."""


# --------------------------------------------------------------------------------------------------
# What travels
# --------------------------------------------------------------------------------------------------


def travelling(root: Path, folder: Path) -> list[Path]:
    """The files that travel: those of the repository that git does not ignore, and FOLDER's."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True)
    if listed.returncode:
        raise RehearsalError(f"{root}: git lists no files ({listed.stderr.decode().strip()})")
    names = listed.stdout.decode().split("\0")
    found = {root / name for name in names if name} | {*folder.rglob("*")}
    return sorted(path for path in found if path.is_file())


def size_problems(files: Iterable[Path]) -> list[str]:
    """What is wrong with the size of what travels; prints it."""
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    print(f"travels: {len(sizes)} files, {total} bytes, {total / 2**20:.1f} MiB", flush=True)
    if total <= MOST_TRAVELS:
        return []
    return [f"{total} bytes would travel, at most {MOST_TRAVELS} do"]


# --------------------------------------------------------------------------------------------------
# Packages
# --------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def machine_packages(text: str) -> dict[str, str]:
    """{package: version or ""} of bench/gpu_machine.txt."""
    lines = (line.strip().partition("==") for line in text.splitlines() if line.strip())
    return {plain(name): version for name, _, version in lines}


def imported(path: Path) -> set[str]:
    """Names of the top-level modules that a script imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def modules(scripts: Iterable[str], root: Path) -> set[str]:
    """Top-level modules that scripts, and the modules of the repository that they import, take
    from packages."""
    found, seen = set(), set()
    waiting = [root / script for script in scripts]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for name in imported(path):
            own = [p for p in (root / f"{name}.py", root / "bench" / f"{name}.py") if p.exists()]
            waiting += [p for p in own if p not in seen]
            if not own:
                found.add(name)
    return found - {*sys.stdlib_module_names}


def fits(wheel: str, python: str) -> bool:
    """Whether a wheel's name says that it is for such a Python ("3.12.3") on Linux."""
    parts = wheel.removesuffix(".whl").split("-")
    if len(parts) not in (5, 6) or not wheel.endswith(".whl"):
        return False
    tags, abis, platforms = (part.split(".") for part in parts[-3:])
    major, minor = python.split(".")[:2]
    own = f"cp{major}{minor}"
    older = {f"cp{major}{n}" for n in range(2, int(minor) + 1)}
    code = (
        (own in tags and own in abis)
        or ("abi3" in abis and bool(older & {*tags}))
        or ("none" in abis and bool({*tags} & {f"py{major}", f"py{major}{minor}", own}))
    )
    return code and any(PLATFORM.fullmatch(platform) for platform in platforms)


def wheels(folder: Path) -> dict[str, str]:
    """{package: name of its wheel} of FOLDER."""
    return {plain(path.name.split("-")[0]): path.name for path in folder.glob("wheels/*.whl")}


def package_problems(
    names: Iterable[str],
    machine: Mapping[str, str],
    brought: Mapping[str, str],
    owners: Mapping[str, list[str]],
) -> list[str]:
    """Which modules would not be found there; prints where each comes from. owners: packages by
    the modules that they have here."""
    problems = []
    for module in sorted(names):
        packages = [plain(name) for name in owners.get(module, [module])]
        there = [name for name in packages if name in machine]
        with_us = [name for name in packages if name in brought]
        if there:
            told = f"there {machine[there[0]]}"
        elif with_us:
            told = brought[with_us[0]]
            if not fits(told, machine.get("python", "")):
                problems.append(f"{told}: not for Python {machine.get('python')} on {PROCESSOR}")
        else:
            told = "missing"
            problems.append(f"{module}: not on the machine, and no wheel of it is brought along")
        print(f"  {module:16}{told}", flush=True)
    return problems


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def lonely() -> list[str]:
    """What a command is begun with so that it has no network; nothing where that is not allowed."""
    try:
        tried = subprocess.run([*ALONE, "true"], capture_output=True)
    except FileNotFoundError:
        return []
    return [*ALONE] if tried.returncode == 0 else []


def bare_environment(home: Path) -> dict[str, str]:
    """Next to nothing. Threads as the caller wants them, for a CPU that others use too."""
    env = {"PATH": f"{os.defpath}:/usr/sbin:/sbin", "HOME": str(home), "LANG": "C.UTF-8"}
    env |= {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
    return env | {"PYTHONPATH": str(home / "hook")}


def unpack(files: Iterable[Path], root: Path, far: Path, refused: set[str]) -> None:
    """Copy what travels into an empty folder, and the hook that refuses modules."""
    for path in files:
        target = far / "repository" / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    hook = far / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK.format(refused=refused))


def call(command: list[str], cwd: Path, env: dict[str, str]) -> int:
    """The exit status of a command; it ends with this process."""
    process = subprocess.Popen(command, cwd=cwd, env=env)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.terminate()
            process.wait()


def run_problems(far: Path, data: Path, stages: list[str]) -> list[str]:
    """Run every stage at tiny size; what went wrong. data: relative to the repository."""
    command = [sys.executable, "bench/gpu_visit.py", "--small", "--data", str(data)]
    command += ["--pack", str(far / "results"), "--seconds", str(SECONDS)]
    command += ["--stages", ",".join(stages)]
    alone = lonely()
    print("without network" if alone else "with network: `unshare -n` does not work", flush=True)
    status = call(alone + command, far / "repository", bare_environment(far))
    problems = [f"gpu_visit.py ended with exit status {status}"] if status else []
    return problems + result_problems(far / "results", stages)


def result_problems(folder: Path, stages: list[str]) -> list[str]:
    """What is wrong with the results; prints them."""
    paths = sorted(folder.rglob("*"))
    problems = []
    for path in paths:
        name, size = path.relative_to(folder), path.stat().st_size
        print(f"  comes back: {name} {size} bytes", flush=True)
        if path.is_dir() or len(name.parts) > 1:
            problems.append(f"{name}: results lie in no folders")
        elif not re.fullmatch(r"[\w.-]+", str(name), re.ASCII):
            problems.append(f"{name}: a name of letters, digits, '.', '_' and '-' comes back")
        if size > MOST_BYTES:
            problems.append(f"{name}: {size} bytes, at most {MOST_BYTES} come back")
    if len(paths) > MOST_FILES:
        problems.append(f"{len(paths)} results, at most {MOST_FILES} come back")
    try:
        said = json.loads((folder / "summary.json").read_text("utf-8"))["stages"]
    except (OSError, ValueError):
        return [*problems, "summary.json does not come back"]
    for name in stages:
        status = said.get(name, {}).get("status", "not run")
        problems += [f"stage {name}: {status}"] * (status != "ok")
    return problems


def rehearse(folder: Path, scripts: Iterable[str], stages: list[str]) -> int:
    """The exit status."""
    folder = folder.resolve()
    if not (folder / "data").is_dir():
        raise RehearsalError(f"--rehearse {folder}: no folder data there")
    if not folder.is_relative_to(ROOT):
        raise RehearsalError(f"--rehearse {folder}: not inside the repository, does not travel")
    files, brought = travelling(ROOT, folder), wheels(folder)
    machine = machine_packages(MACHINE.read_text("utf-8"))
    owners = importlib.metadata.packages_distributions()
    problems = size_problems(files)
    needed = modules(["bench/gpu_visit.py", *scripts], ROOT)
    problems += package_problems(needed, machine, brought, owners)
    allowed = machine.keys() | brought.keys()
    refused = {name for name, own in owners.items() if not {plain(o) for o in own} & allowed}
    with tempfile.TemporaryDirectory() as name:
        far = Path(name)
        unpack(files, ROOT, far, refused)
        problems += run_problems(far, folder.relative_to(ROOT) / "data", stages)
    print("\n".join(f"problem: {problem}" for problem in problems) or "ready")
    return int(bool(problems))
