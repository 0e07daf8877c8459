"""What is said of a report before it is laid out: sentences, columns, levels."""
