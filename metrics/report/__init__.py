"""What people look at: tables, figures, notes on the numbers, and the HTML page."""
