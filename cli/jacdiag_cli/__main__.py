"""`python -m jacdiag_cli` is `jacdiag`."""

import sys

from jacdiag_cli.main import main

sys.exit(main())
