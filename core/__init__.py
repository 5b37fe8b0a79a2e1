"""A run: its configuration, what it computes (model), keeps (checkpoint), scores (evaluation), and how (training)."""
