"""A package, so that its fixtures may last as long as its tests do."""
