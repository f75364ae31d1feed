"""Programs that run from end to end on a real model and real data."""
