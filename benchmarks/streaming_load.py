"""What it takes to load a model as NF4: peak memory against the memory it ends with. A random Llama
of about 3 B.

    python benchmarks/streaming_load.py --tokenizer-of BASE_FOLDER [--scratch DIR] [--layers N]

The folder is written shard by shard (6 GB at 3 B parameters) and removed afterwards; the load runs
in its own process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_llama import write_random_llama

LOAD = """
import json, sys, time
from veneer.models.load import load_base
from veneer.bases.identity.weight_table import weight_table
def kib(what):
    return 1024 * int(open('/proc/self/status').read().split(what + ':')[1].split()[0])
before = kib('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
start = time.perf_counter()
base = load_base(sys.argv[1], quantize=sys.argv[2] if sys.argv[2] != 'dense' else None)
print(json.dumps({'seconds': time.perf_counter() - start, 'before': before,
                  'peak': kib('VmHWM'), 'after': kib('VmRSS'),
    'weights': sum(g.bytes for g in weight_table(base.model)),
    'table': [[g.what, g.held, g.values, g.bytes] for g in weight_table(base.model)]}))
"""


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokenizer-of", type=Path, required=True, help="a model folder")
    p.add_argument("--scratch", type=Path)
    p.add_argument("--layers", type=int, default=28)
    p.add_argument("--hidden", type=int, default=3072)
    p.add_argument("--feed-forward", type=int, default=8192)
    p.add_argument("--formats", nargs="+", default=["nf4"], choices=["nf4", "fp4", "dense"])
    args = p.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        start = time.perf_counter()
        count = write_random_llama(
            scratch / "model",
            tokenizer_of=args.tokenizer_of,
            hidden=args.hidden,
            feed_forward=args.feed_forward,
            layers=args.layers,
            heads=args.hidden // 128,
            kv_heads=max(1, args.hidden // 128 // 3),
        )
        print(
            f"{count / 1e9:.2f} B parameters, {2 * count / 1e9:.2f} GB, written in"
            f" {time.perf_counter() - start:.0f} s"
        )
        for held in args.formats:
            command = [sys.executable, "-c", LOAD, str(scratch / "model"), held]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found = json.loads(done.stdout)
            peak, final = found["peak"] - found["before"], found["after"] - found["before"]
            print(
                f"{held}: {found['seconds']:.0f} s; weights {found['weights'] / 1e9:.2f} GB;"
                f" process above its imports: peak {peak / 1e9:.2f} GB, afterwards"
                f" {final / 1e9:.2f} GB"
            )
            for what, kind, values, size in found["table"]:
                print(
                    f"  {what:<18}{kind:<10}{values / 1e6:>9.1f} M {size / 1e6:>9.1f} MB  "
                    f"{size / max(values, 1):.4f} B each"
                )
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
