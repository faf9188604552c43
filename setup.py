"""The native kernels, compiled at install. Everything else about the package stands in pyproject.toml.

They are plain C without Python's or torch's headers, loaded by veneer/kernels/native.py. Without a compiler the
package still installs and the plain torch paths run.
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
            extra_compile_args=["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
