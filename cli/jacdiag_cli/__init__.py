"""The command line of jacdiag, one file per command: options in, library call, renderer out."""
