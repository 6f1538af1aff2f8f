"""A run's folder and its events, and what shows them: console, report, plots, trackers, inventory."""
