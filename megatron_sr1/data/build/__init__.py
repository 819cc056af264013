"""From samples of any source to shards: checked, cut, written, resumable to the same bytes."""
