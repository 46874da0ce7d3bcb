"""What surrounds the routes? Schemas, the engine's process, keys, limits and logs."""
