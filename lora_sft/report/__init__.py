"""What a run looks like to a person: live display, tables, pages."""
