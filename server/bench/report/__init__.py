"""What a run looks like: live, as a table, and as a page."""
