"""Files that are there whole or not at all, model folders, provenance."""
