"""Model registries: `base` holds the abstract type, each other module one implementation."""
