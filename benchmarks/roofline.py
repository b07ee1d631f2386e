"""The static roofline of every kernel, without a GPU: `fastdiff bench --static --size full`, and its options."""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--static", "--size", "full", *sys.argv[1:]]))
