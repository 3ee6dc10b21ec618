"""Prompts: read, streamed, encoded."""
