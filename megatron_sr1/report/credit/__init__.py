"""What two objectives credit of one step: tables and a page."""
