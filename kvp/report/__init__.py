"""Reports on runs: tables, plots and a page from their records."""
