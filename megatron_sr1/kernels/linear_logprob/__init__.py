"""Log-probabilities of tokens from hidden states, without logits: one function, three back ends."""
