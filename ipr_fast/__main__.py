"""`python -m ipr_fast` is the command `ipr-fast`."""

import sys

from ipr_fast.cli import main

sys.exit(main())
