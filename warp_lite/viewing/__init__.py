"""Pictures: fronts, reports, the explorer."""
