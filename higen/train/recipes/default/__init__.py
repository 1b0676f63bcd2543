"""The default model that ships in the wheel: twelve animated emoji, trained on two CPU cores."""
