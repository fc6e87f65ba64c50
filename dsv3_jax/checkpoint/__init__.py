"""What survives a process: training checkpoints (Orbax) and Hugging Face directories (safetensors)."""
