"""The command line: flags, process start-up, and one small file per verb."""
