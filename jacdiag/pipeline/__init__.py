"""Lead a source to a report: the options of an audit, its steps, and its provenance."""
