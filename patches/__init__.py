"""Model families: one file each, named after the model's `config.model_type`."""
