"""The order of things: cold start, self-rewarded GRPO, evaluation. No mathematics here."""
