"""How a report is shown: tables, galleries, plots, the HTML page."""
