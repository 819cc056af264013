"""When two answers are the same: one spelling, then readings of each kind, then their comparison."""
