"""The native kernels, compiled at install. Everything else about the package stands in
pyproject.toml.

They are plain C without Python's or torch's headers, loaded by veneer/kernels/bindings/library.py.
Without a compiler the package still installs and the plain torch paths run. Nothing in them depends
on a version of Python (abi3): one wheel for each system and processor serves 3.11 and all that
follow.
"""

import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/veneer/kernels/native")
SOURCES = runpy.run_path("src/veneer/kernels/sources.py")["digest"]()


class BuildAtOnce(build_ext):
    """As many files at a time as there are processors, up to 8: setuptools compiles one after
    another."""

    def build_extensions(self):
        one_by_one = self.compiler.compile

        def compiled(sources, **how):
            largest_first = sorted(sources, key=lambda source: -Path(source).stat().st_size)
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                made = {
                    source: pool.submit(one_by_one, [source], **how) for source in largest_first
                }
                return [file for source in sources for file in made[source].result()]

        self.compiler.compile = compiled
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildAtOnce},
    ext_modules=[
        Extension(
            "veneer.kernels._native",
            sources=sorted(str(path) for path in NATIVE.rglob("*.c")),
            depends=sorted(str(path) for path in NATIVE.rglob("*.h")),
            include_dirs=sorted({str(path.parent) for path in NATIVE.rglob("*.h")}),
            define_macros=[("VENEER_SOURCES", f'"{SOURCES}"')],
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=off",
            ],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
