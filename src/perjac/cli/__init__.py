"""The command line: one file for each command, what it reads and writes, and its pages."""
