"""holimerge: training-free token merging for Hugging Face video LLMs."""
