"""The engine: vLLM in this process, and how weights get into it. The only place that imports vllm."""
