"""What the user hands over: models, SavedModels, inputs, variables, losses."""
