"""Resources: compute backends, feature store, model registry, endpoint hosts. They know backends, not house prices."""
