"""What proof forms add to the forward of a model."""
