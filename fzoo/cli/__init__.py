"""The command line: `fzoo --help`."""
