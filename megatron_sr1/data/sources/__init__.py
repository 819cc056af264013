"""Where samples come from before they are shards: one reader for each format."""
