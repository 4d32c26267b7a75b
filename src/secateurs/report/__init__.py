"""The report: one self-contained HTML file, and the tables of the command line."""
