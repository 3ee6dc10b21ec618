"""Evidence: trained runs and closed-form worlds, with their tables and pictures."""
