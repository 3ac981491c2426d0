"""`python -m ipr_fast` is the command `ipr-fast`."""

import sys

from ipr_fast.cli.main import main

sys.exit(main())
