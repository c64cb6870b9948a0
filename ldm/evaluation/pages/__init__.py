"""Pages of a report: tables for the terminal, galleries, plots, the HTML page."""
