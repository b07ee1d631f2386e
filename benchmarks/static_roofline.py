"""The static roofline of every kernel, without a GPU: `python benchmarks/static_roofline.py --size full`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.static import roofline

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["quick", "full"], default="full", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="all compiled code to DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the predictions")
    sys.exit(roofline.main(parser.parse_args()))
