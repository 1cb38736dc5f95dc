"""The command line: `prefkern check`, `prefkern bench`, `prefkern train`."""
