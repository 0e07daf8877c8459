"""Published checkpoint layouts, imitated with tiny weights."""
