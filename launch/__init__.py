"""The command line and everything that starts processes."""
