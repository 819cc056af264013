"""The report of a sweep: groups over seeds, tables, curves with their spread."""
