"""`python -m jacdiag_cli` is `jacdiag`."""

import sys

from jacdiag_cli.app import main

sys.exit(main())
