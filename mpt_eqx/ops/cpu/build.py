"""Compiles the kernel beside its sources: when the package is built, or later by `python -m mpt_eqx.ops.cpu.build`.

It stands alone, because neither JAX nor the package is there while a wheel is built.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "libkernel.so"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-w")
# What computes is compiled once for each of these; which copy runs is decided on the machine it runs on.
X86 = {"v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512")}
TILES = (*X86["v4"], "-mamx-tile", "-mamx-bf16", "-mavx512bf16")
"""Of Intel's tiles, which older compilers do not know, and without which the rest is linked."""


def compile_kernel(library: Path = LIBRARY) -> str | None:
    """Returns None if `library` was made, else why not. The compiler is $CXX, c++ or g++."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    if not shutil.which(compiler[0]):
        return f"no C++ compiler was found (looked for {compiler[0]}); install one, or set CXX"
    try:
        import jaxlib
    except ImportError:
        return "jaxlib, whose headers are needed, is not installed"
    headers = Path(jaxlib.__file__).parent / "include"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as directory:

        def start(source: str, name: str, *flags: str) -> tuple[list[str], subprocess.Popen[str]]:
            command = [*compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", f"{directory}/{name}.o"]
            return command, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        jobs = [start("kernel.cc", "kernel", "-isystem", str(headers), *["-DMPT_EQX_X86"] * x86)]
        for isa, flags in {"default": (), **(X86 if x86 else {})}.items():
            for name in ("matmul", "gemm", "attention"):
                jobs.append(start(f"{name}.cc", f"{name}_{isa}", f"-DMPT_EQX_ISA={isa}", *flags))
        tiles = start("amx.cc", "amx", *TILES)[1] if x86 and sys.platform == "linux" else None
        outputs = [job.communicate()[0] for _, job in jobs]
        if tiles is not None:
            tiles.communicate()
        for (command, job), output in zip(jobs, outputs, strict=True):
            if job.returncode:
                return f"{shlex.join(command)} failed: {output.strip()[-2000:]}"
        # Moved into place, because a process may have loaded the old one.
        made = f"{library}.{os.getpid()}"
        objects = sorted(str(path) for path in Path(directory).glob("*.o"))
        link = subprocess.run([*compiler, "-shared", *objects, "-o", made], capture_output=True, text=True, check=False)
        if link.returncode:
            return f"linking failed: {link.stderr.strip()[-2000:]}"
        os.replace(made, library)
    return None


if __name__ == "__main__":
    problem = compile_kernel()
    sys.exit(f"no kernel: {problem}" if problem else None)
