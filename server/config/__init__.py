"""The configuration: one YAML file, its sections, and how it is read."""
