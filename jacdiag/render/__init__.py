"""What a person sees of a report: table, picture, Markdown. Reads reports only; no torch here."""
