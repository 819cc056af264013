"""The offline converter: Hugging Face folders <-> Megatron checkpoints, tensor by tensor, and their comparison."""
