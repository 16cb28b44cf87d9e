"""Rules over changes, and what became of places from date to date."""
