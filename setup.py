"""Builds d3rt._C with CMake and Ninja, and installs the top-level folder kernels/ as d3rt.kernels.

Everything else about the package stands in pyproject.toml, and how the C++ is compiled in CMakeLists.txt.
CMake and Ninja come from PyPI (build-system.requires), so a machine needs only Python and a C++17 compiler.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def build_tool(name: str) -> str:
    """Path of cmake or ninja: this Python's own before the PATH's (a venv need not be activated)."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} not found: `pip install {name}`, or build without --no-build-isolation.")
    return found


class CMakeBuild(build_ext):
    """Lets CMake build the one extension and put it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # One folder per Python and platform, kept between builds: only what changed is compiled again.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        configure = [
            build_tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            # Isolated builds get new copies of these each time, so what CMake remembers of them is stale.
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            "-DD3RT_PYTHON=ON",
            "-DD3RT_TESTS=OFF",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        if (build / "CMakeCache.txt").exists():
            configure.insert(1, "--fresh")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([build_tool("cmake"), "--build", str(build), "-j", jobs], check=True)
        shutil.copy2(build / output.name, output)


setup(
    packages=[
        *find_packages(include=["d3rt", "d3rt.*"]),
        "d3rt.kernels",
        *(f"d3rt.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"d3rt.kernels": "kernels"},
    ext_modules=[Extension("d3rt._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
