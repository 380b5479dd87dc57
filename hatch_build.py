"""Compiles the CPU kernel while the package is built, where a C++ compiler is found; without one nothing is missed."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).parent / "mpt_eqx" / "kernel"
LIBRARY = SOURCES / "libmatvec.so"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-Wno-psabi", "-w"]
# One copy of the products for each; which of them runs is chosen on the machine they run on.
X86 = {"rows_v3": ["-march=x86-64-v3"], "rows_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


class KernelHook(BuildHookInterface):
    """Puts libmatvec.so beside its sources and into the wheel."""

    def initialize(self, version, build_data):
        """Compiles, and says on stderr what came of it."""
        LIBRARY.unlink(missing_ok=True)
        problem = compile_kernel()
        if problem:
            print(f"mpt_eqx: no CPU kernel, which is optional: {problem}", file=sys.stderr)
            return
        build_data["artifacts"].append("mpt_eqx/kernel/libmatvec.so")
        # It is no Python extension: any Python 3 of this platform may load it.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["pure_python"] = False


def compile_kernel() -> str | None:
    """Returns why there is no kernel, or None if LIBRARY is there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not shutil.which(compiler[0]):
        return "no C++ compiler was found (c++, g++ or $CXX)"
    try:
        import jaxlib
    except ImportError:
        return "jaxlib, whose headers it needs, was not there while building"
    headers = Path(jaxlib.__file__).parent / "include"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as directory:

        def built(source: str, name: str, *flags: str) -> subprocess.Popen:
            command = [*compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", f"{directory}/{name}.o"]
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        jobs = [built("matvec.cc", "matvec", "-isystem", str(headers), *["-DMPT_EQX_X86"] * x86)]
        for name, flags in {"rows_default": [], **(X86 if x86 else {})}.items():
            jobs.append(built("rows.cc", name, f"-DMPT_EQX_ISA={name}", *flags))
        for job in jobs:
            output, _ = job.communicate()
            if job.returncode:
                for other in jobs:
                    other.kill()
                return f"{' '.join(job.args)} failed: {output.strip()[-2000:]}"
        objects = [str(path) for path in sorted(Path(directory).glob("*.o"))]
        link = subprocess.run(
            [*compiler, "-shared", *objects, "-o", str(LIBRARY)], capture_output=True, text=True, check=False
        )
        return None if link.returncode == 0 else f"linking failed: {link.stderr.strip()[-2000:]}"
