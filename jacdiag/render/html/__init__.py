"""Pages that a browser opens: one file each, which loads nothing from elsewhere."""
