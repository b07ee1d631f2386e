"""`python -m fastdiff` is the command `fastdiff`."""

import sys

from fastdiff_command import main

sys.exit(main())
