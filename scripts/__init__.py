"""Command line tools: parse, call the package, print."""
