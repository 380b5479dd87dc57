"""Compiles the CPU kernel while the package is built, where there is a C++ compiler; nothing is missed without it."""

import runpy
import sys
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNEL = Path(__file__).parent / "mpt_eqx" / "ops" / "cpu"


class KernelHook(BuildHookInterface):
    """Puts the library into the wheel, or leaves a wheel for every platform."""

    def initialize(self, version, build_data):
        """Compiles, and says on stderr why if it does not work."""
        build = runpy.run_path(str(KERNEL / "build.py"))
        build["LIBRARY"].unlink(missing_ok=True)
        problem = build["compile_kernel"]()
        if problem:
            print(f"mpt_eqx is built without its CPU kernel, which is optional: {problem}", file=sys.stderr)
            return
        build_data["artifacts"].append(build["LIBRARY"].relative_to(KERNEL.parents[2]).as_posix())
        # It is no Python extension: any Python 3 on this platform may load it.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["pure_python"] = False
