"""The networks: families, sources, loading, LoRA, memory."""
