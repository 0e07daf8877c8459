"""From a source to a report: the options of an audit, its steps, and what the report records about itself."""
