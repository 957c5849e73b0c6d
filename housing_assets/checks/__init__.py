"""Checks of the assets. Blocking ones stop everything downstream; the others warn."""
