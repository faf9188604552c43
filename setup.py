"""The native kernels, compiled at install. Everything else about the package stands in pyproject.toml.

They are plain C without Python's or torch's headers, loaded by veneer/kernels/native.py. Without a compiler the
package still installs and the plain torch paths run. Nothing in them depends on a version of Python (abi3): one
wheel for each system and processor serves 3.11 and all that follow.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("src/veneer/kernels/native")

setup(
    ext_modules=[
        Extension(
            "veneer.kernels._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.c")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
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
