"""The command line: `prefkern check`, `bench`, `train`, `margins` and `plan`."""
