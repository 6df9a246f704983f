"""The pages, tables and plots that are made from the raw results, and the check that they are fresh."""
