"""What `make bench` runs: Veneer's own figures on this machine, without peers. Minutes, not
seconds.

With peers: benchmarks/train_speed.py. Quality: benchmarks/quality.py. Results: docs/benchmarks.md.
"""

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    veneer = str(Path(sys.executable).with_name("veneer"))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run([veneer, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    print(f"veneer --help: {1000 * sorted(times)[5]:.0f} ms (median of 10)")
    subprocess.run([sys.executable, str(HERE / "scaling.py"), "--base", "smollm2-135m"], check=True)


if __name__ == "__main__":
    main()
