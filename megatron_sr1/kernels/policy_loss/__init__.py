"""The policy loss of a micro-batch in one pass, on torch and on Triton."""
