"""Command line: arguments, exit codes, and what is printed."""
