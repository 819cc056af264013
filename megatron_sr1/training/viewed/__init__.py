"""What the report's viewer shows of saved steps: their samples, advantages, images, and whose objective made them."""
