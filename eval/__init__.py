"""Command line, measurements and reports."""
