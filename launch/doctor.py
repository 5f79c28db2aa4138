"""`saddle doctor`: what works on this machine, what is missing, and how to mend it."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from launch.cli import run
from launch.tables import json_option, save_rows

ROOT = Path(__file__).resolve().parent.parent
OK, NOTE, MISSING, BROKEN = "ok", "note", "missing", "broken"


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    state: str  # OK; NOTE: works, but could be better; MISSING; BROKEN
    found: str
    remedy: str = ""
    needed: bool = False  # training cannot run without it


@click.command()
@json_option
def main(json_path: Path | None) -> int:
    """Show what works on this machine, what is missing, and how to install it. Exits with 2 if training cannot run."""
    findings = examine()
    for line in table(findings):
        click.echo(line)
    stops = [finding.name for finding in findings if finding.needed and finding.state in (MISSING, BROKEN)]
    click.echo(f"training cannot run: mend {', '.join(stops)}" if stops else "training can run")
    save_rows(json_path, {"works": not stops, "findings": [asdict(finding) for finding in findings]})
    return 2 if stops else 0


def examine() -> list[Finding]:
    """The findings of all PROBES. A probe's exception becomes a finding, as this command must run on any machine."""
    findings: list[Finding] = []
    for name, (probe, needed) in PROBES.items():
        try:
            findings += probe()
        except Exception as error:  # anything may be broken on this machine
            found = f"{type(error).__name__}: {error}"
            findings.append(Finding(name, BROKEN, found, "./run setup installs all that is needed", needed))
    return findings


def table(findings: list[Finding]) -> Iterator[str]:
    """Lines for people: state, name, what was found; the remedy below it."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{finding.state:7}  {finding.name:{width}}  {' '.join(finding.found.split())}"
        if finding.remedy:
            yield f"{'':7}  {'':{width}}  -> {finding.remedy}"


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()}, {platform.platform()}"
    new_enough = sys.version_info >= (3, 11)
    state, remedy = (OK, "") if new_enough else (BROKEN, "install Python 3.11 or newer")
    yield Finding("python", state, found, remedy, needed=True)


def _torch() -> Iterator[Finding]:
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
    found = f"{torch.__version__}, {built}, CPU: {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("PyTorch", OK, found, needed=True)


def _packages() -> Iterator[Finding]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        yield _package(requirement, "")
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            yield _package(requirement, extra)


def _package(requirement: str, extra: str) -> Finding:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    name = wanted.name
    install = f"pip install '{requirement}'"
    label = f"{name} [{extra}]" if extra else name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(label, NOTE if extra else MISSING, "not installed", install, needed=not extra)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(label, NOTE if extra else BROKEN, f"{version}, and {requirement} is needed", install, not extra)
    return Finding(label, OK, version, needed=not extra)


def _compiler() -> Iterator[Finding]:
    from ops.toolchain import BuildError, find_compiler

    try:
        compiler = find_compiler()
    except BuildError as error:
        yield Finding("C++ compiler", MISSING, str(error), "apt-get install g++; until then the reference kernels run")
        return
    flags = " ".join(compiler.flags) or "portable"
    yield Finding("C++ compiler", OK, f"{compiler.path}, {compiler.version}, {flags}")


def _ninja() -> Iterator[Finding]:
    from ops.toolchain import find_ninja

    path = find_ninja()
    if path:
        yield Finding("ninja", OK, path)
    else:
        yield Finding("ninja", MISSING, "not found", "pip install ninja")


def _nvcc() -> Iterator[Finding]:
    from ops.toolchain import cuda, find_nvcc

    nvcc = find_nvcc()
    missing = cuda()[2]  # what is missing to compile kernels for this machine's GPU
    found = f"CUDA {nvcc.version} in {nvcc.home}" if nvcc else "not found"
    if missing:
        yield Finding("nvcc", BROKEN if nvcc else MISSING, found, f"{missing}; until then the GPU runs the reference")
    elif nvcc:
        yield Finding("nvcc", OK, found)
    else:
        yield Finding("nvcc", NOTE, f"{found}, and not needed here")


def _gpus() -> Iterator[Finding]:
    import torch

    from ops.toolchain import architectures, capabilities, find_nvcc

    if not capabilities():
        cpu_build = torch.version.cuda is None
        why = "torch is built for the CPU alone" if cpu_build else "torch sees none (driver? container?)"
        yield Finding("GPU", NOTE, f"none: {why}")
        return
    nvcc = find_nvcc()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        try:
            if nvcc and "PTX" in architectures([(gpu.major, gpu.minor)], nvcc.architectures):
                found += ", newer than nvcc: compiled by its driver"
            yield Finding(f"GPU {index}", OK, found)
        except ValueError as error:
            yield Finding(f"GPU {index}", NOTE, found, str(error))


def _kernels() -> Iterator[Finding]:
    from ops.build import cache
    from ops.choice import status
    from ops.toolchain import BuildError

    try:
        now = status()
    except BuildError as error:
        yield Finding("SADDLE_OPS", BROKEN, str(error), "unset SADDLE_OPS", needed=True)
        return
    if now.library:
        yield Finding("compiled kernels", OK, f"compiled: {now.library}")
    else:
        found = f"not compiled yet, key {now.key}" if now.key else "none"
        yield Finding("compiled kernels", NOTE, found, "python -m ops.build")
    found = f"{now.mode}: the {now.kernels} kernels"
    if not now.missing:
        yield Finding("SADDLE_OPS", OK, found)
    elif now.mode == "compiled":
        yield Finding("SADDLE_OPS", BROKEN, found, now.missing, needed=True)
    else:
        yield Finding("SADDLE_OPS", NOTE, found, now.missing)
    yield _kernel_cache(cache())


def _kernel_cache(folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / 2**30:.1f} GiB free"
    if not os.access(existing, os.W_OK):
        found += ", cannot be written"
    elif free > 100 * 2**20:
        return Finding("kernel cache", OK, found)
    return Finding("kernel cache", BROKEN, found, "set SADDLE_CACHE to another directory")


def _threads() -> Iterator[Finding]:
    import torch

    from gan.ranks.distributed import cores

    found = f"{torch.get_num_threads()} threads of torch, {cores()} cores for this process of {os.cpu_count()}"
    limit = os.environ.get("OMP_NUM_THREADS")
    yield Finding("threads", OK, f"{found}, OMP_NUM_THREADS={limit}" if limit else found)
    runtimes = openmp_runtimes()
    if len(runtimes) < 2:
        yield Finding("OpenMP", OK, ", ".join(runtimes) or "none")
    else:
        remedy = "two OpenMP runtimes slow each other down: find what loads the second one (LD_PRELOAD? a library?)"
        yield Finding("OpenMP", NOTE, ", ".join(runtimes), remedy)


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that are loaded into this process; none on systems other than Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.search(r"lib(gomp|omp|iomp5)[^/]*\.so", path))


def _memory() -> Iterator[Finding]:
    from ops.memory import is_glibc

    settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUN"))]
    preloaded = os.environ.get("LD_PRELOAD")
    if preloaded:
        settings.append(f"LD_PRELOAD={preloaded}")
    if is_glibc():
        library = f"glibc {platform.libc_ver()[1]}, pages of freed tensors are kept"
        yield Finding("malloc", OK, ", ".join([library, *settings]))
    else:
        yield Finding("malloc", NOTE, ", ".join(["not glibc: used as it is", *settings]))


def _ffmpeg() -> Iterator[Finding]:
    from gan.errors import UserError
    from launch.video import find_ffmpeg

    try:
        yield Finding("ffmpeg", OK, find_ffmpeg())
    except UserError as error:
        yield Finding("ffmpeg", NOTE, "not found: no videos", str(error))


PROBES: dict[str, tuple[Callable[[], Any], bool]] = {  # name -> (the probe, does training need it?)
    "python": (_python, True),
    "PyTorch": (_torch, True),
    "packages": (_packages, False),
    "C++ compiler": (_compiler, False),
    "ninja": (_ninja, False),
    "nvcc": (_nvcc, False),
    "GPU": (_gpus, False),
    "compiled kernels": (_kernels, False),
    "threads": (_threads, False),
    "malloc": (_memory, False),
    "ffmpeg": (_ffmpeg, False),
}


if __name__ == "__main__":
    run(main, "saddle doctor")
