"""Hostile input for everything that reads files: what comes out is a value, or an error that is documented."""
