"""The static roofline of each kernel, without a GPU: `python benchmarks/static_roofline.py --size full`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.static import roofline
from benchmarks.workloads import refuse_interpreter


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (default: sys.argv[1:]). Returns 0, or 1 after one line on stderr; bad usage exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", choices=["quick", "full"], default="full", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write all compiled code to DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the predictions as a PNG")
    args = parser.parse_args(argv)
    try:
        refuse_interpreter()
        return roofline.main(args)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
