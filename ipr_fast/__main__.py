"""Run the command `ipr-fast` as `python -m ipr_fast`."""

import sys

from ipr_fast.cli.main import main

sys.exit(main())
