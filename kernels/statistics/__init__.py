"""The statistics of a row: one file for each."""
