"""How much memory a run needs, before anything is loaded, and what would make it fit."""
