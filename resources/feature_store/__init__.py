"""Feature stores: where records are kept, each with its history, and read at a point in time."""
