"""What a run ships: pipeline, card, summary."""
