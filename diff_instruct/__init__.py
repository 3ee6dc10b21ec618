"""Parts of the Diff-Instruct++ training example. The script puts them together; `objectives` is the mathematics."""
