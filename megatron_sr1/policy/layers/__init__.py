"""The layers of the language model: plain torch's and Transformer Engine's, and what both share."""
