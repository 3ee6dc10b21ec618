"""The embedded world of the bare command."""
