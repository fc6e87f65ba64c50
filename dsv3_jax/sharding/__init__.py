"""Where arrays live and how tokens move."""
