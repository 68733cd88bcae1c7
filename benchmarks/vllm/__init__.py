"""Real vLLM on the GPUs of one host: no balancing, vLLM's own EPLB and ours, in one scripted run. See README.md here."""
