"""Speed and memory: what a run costs."""
