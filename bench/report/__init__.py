"""Pages, tables and plots generated from the raw results, and the check that they are up to date."""
