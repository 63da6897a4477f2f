"""Many tenants' LoRA training on one base model."""
