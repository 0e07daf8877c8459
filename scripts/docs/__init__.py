"""How the site is built: what `make docs` adds to the pages in `docs/`."""
